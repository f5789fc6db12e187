"""All that UTF-8 can encode, for hypothesis, which takes seconds to learn that from the codec."""

from hypothesis import strategies as st

CHARACTERS = st.characters(exclude_categories=["Cs"])
