"""Raw text to curated text, by datatrove's pipelines: `smol curate CONFIG`, then `smol preprocess`.

config      what a curation file may say          steps        the steps it may name, with their parameters
pipeline    phases and executors (local, Slurm)   reading      inputs to documents, bad ones counted
duplicates  MinHash and exact                     contamination  benchmark items in the text
kept        examples, shares and lengths          card         the funnel, as HTML and JSON
"""
