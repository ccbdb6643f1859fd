"""`mpt-jax report DIR`: one self-contained HTML page about a demo or a table of `mpt-jax paper`.

run_reader.py         reader of run folders: losses and scores by step, artifacts, records
analysis.py           statistics: comparisons, gains, similarities, examples needed
tables.py             text tables for the terminal and the page
figures.py            SVG figures in the page's colors
page.py               HTML of the page
context.py            input that all sections share: labels, styles, missing data
result_sections.py    sections computed from results.json
gain_sections.py      gains over prompt tuning and over zero-shot
transfer.py           statistics of transfer from single sources
transfer_sections.py  sections about transfer from single sources
run_sections.py       sections read from run folders: curves, prompts, provenance
single_run.py         the page of one MODEL_DIR
confusion.py          confusion matrices of image tasks
lane_job.py           sample images of a job with lanes, and the attention of the lanes
lane_pictures.py      pictures of the attention of lanes
mixture_sections.py   sections about the weights of mixed prompts
sections.py           order of the sections; writes the page
"""
