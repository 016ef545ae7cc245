"""Which data is worth its tokens: small runs that differ in their mixture, compared with error bars.

config   what an ablation file may say       recipes   one recipe a run      run      carries them out
results  losses and scores over seeds        view      the table
"""
