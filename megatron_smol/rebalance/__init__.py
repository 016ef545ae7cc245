"""What the next stage should read, argued from what the run and its ablations measured; a person decides.

run        the run, and the stage to come      evidence  ablations, evaluations, validation losses
room       what the epoch caps leave           law       loss against mixture, with its error on what it has not seen
propose    the weights, each with its reason   diff      the proposal as a change of the recipe's text
view       the page on the terminal, and JSON
"""
