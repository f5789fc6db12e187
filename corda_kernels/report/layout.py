"""How a page looks: on a screen of any width, and on paper."""

CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;max-width:74rem;padding:1rem;background:#fff;color:#1b1b1b;
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
 overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.15rem;margin:2rem 0 .25rem;padding-top:.75rem;border-top:1px solid #ccc}
p{margin:.25rem 0 .75rem;max-width:46rem}
code{font-family:ui-monospace,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em}
.summary{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr));
 gap:.6rem 1.5rem;margin:.75rem 0}
.summary .wide{grid-column:1/-1;max-width:46rem}
.summary dt{color:#555;font-size:.85rem}
.summary dd{margin:0;font-weight:600}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20.5rem),1fr));
 gap:1.25rem 1rem;align-items:start}
figure{margin:0;break-inside:avoid}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:.15rem}
figure svg{display:block;width:100%;max-width:27rem;height:auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
.scroll{overflow-x:auto;border:1px solid #ccc;border-radius:4px}
.scroll:focus-visible{outline:2px solid #0072b2}
table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums;width:100%;
 overflow-wrap:normal}
caption{text-align:left;padding:.4rem .5rem;color:#555}
th,td{padding:.15rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid #eee}
tbody th,thead th:first-child{text-align:left;font-weight:400;position:sticky;left:0}
tbody th{background:#fff}
thead th{background:#f4f4f4;border-bottom:1px solid #999;font-weight:600}
abbr{text-decoration:none}
.legend{font-size:.8rem;color:#444;columns:18rem;padding:0 .5rem 0 1.4rem;margin:.6rem 0}
footer{margin:2rem 0 .5rem;color:#555;font-size:.85rem}
@media print{
 @page{margin:14mm}
 body{max-width:none;padding:0;font-size:9.5pt}
 h2,section>p{break-after:avoid}
 p{break-inside:avoid}
 .panels{grid-template-columns:repeat(2,1fr);gap:.5rem 1rem}
 .table{break-before:page}
 .scroll{overflow:visible;border:0}
 table{font-size:6pt}
 th,td{padding:.05rem .2rem}
 tbody th,thead th:first-child{position:static}
 thead{display:table-header-group}
 tr{break-inside:avoid}
}
""".strip()
