"""Many runs from one file: a grid over settings and data sets, here or on a cluster, with their results in one table."""
