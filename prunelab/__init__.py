"""What both products share: data sets, networks by name, training, run folders, pages.

It knows nothing of pruning.
"""
