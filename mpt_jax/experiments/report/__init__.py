"""`mpt-jax report DIR`: one self-contained HTML page of what a demo or a paper table left.

folders.py      what lies in the folders of runs: losses and scores by step, artifacts, records
analysis.py     numbers: methods side by side, gains, similarities, examples needed
tables.py       rows of text, for terminals and pages
figures.py      drawings, as SVG in the page's own colors
page.py         the HTML
content.py      what all sections share: names, styles, what is absent
of_results.py   sections of what results say
of_runs.py      sections of what runs left: curves, prompts, provenance
sections.py     their order; writes the page
"""
