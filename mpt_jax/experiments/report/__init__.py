"""`mpt-jax report DIR`: one self-contained HTML page about a demo or a table of the paper.

run_reader.py         reads run folders: losses and scores by step, artifacts, records
analysis.py           statistics: comparisons, gains, similarities, examples needed
tables.py             text tables, for terminals and pages
figures.py            figures, as SVG in the page's colors
page.py               the HTML
context.py            shared by all sections: labels, styles, missing data
result_sections.py    sections from results.json
run_sections.py       sections from run folders: curves, prompts, provenance
mixture_sections.py   sections about the weights of mixed prompts
sections.py           their order; writes the page
"""
