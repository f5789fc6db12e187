"""What an adapter or covariances hold: a table, and a page with figures in one HTML file."""
