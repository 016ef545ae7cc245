"""Raw text to curated text, by datatrove's pipelines: `smol curate CONFIG`, then `smol preprocess`.

config      what a curation file may say          steps          the steps it may name, with their parameters
pipeline    phases (local: here; or Slurm)        local          tasks of a phase on this machine
reading     inputs to documents, bad ones counted warc, code     web pages and source files as documents
parts       files between phases, and the result  duplicates     MinHash and exact
filters     language, length, URL, ...            scoring        by a score, or a share of each
domains     which sites are read again            contamination  benchmark items in the text
kept        examples, shares and lengths          card, epochs   the funnel as HTML and JSON; epochs in a recipe
annotate    a language model's scores             classifier     what learns them
endpoint    the client for language models        answers        its answers on the disk
chat        instructions, rewrites, preferences
"""
