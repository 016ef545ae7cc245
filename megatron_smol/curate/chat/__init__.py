"""Chat data: conversations and preferences that language models write or that lie there, `smol chatdata CONFIG`.

config      what a chat data file may say           pipeline     parts, their steps, the mix, the output
magpie      conversations out of a chat template    constrained  answers that a program can check; `constraints` checks
texts       rewriting and summarising               given        rows of other data sets
preferences the better and the worse of k answers   judge        scores by a model or by fields
steps       what a part keeps                       semantic     near equal in meaning
rows        a row, and what is counted              card         the funnel, as HTML and JSON
"""
