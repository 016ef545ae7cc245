"""Which data is worth its tokens: small runs that differ in their mixture, compared with error bars.

config    what an ablation file may say        recipes  one recipe a run       run, array  carry them out, here or by Slurm
contrast  more than the seeds' difference?     results  losses and scores by arm, with errors                view  the tables
demo      the data of examples/ablation_demo.sh
"""
