"""`posttrain bench kernels`: the kernels on the user's card against the memory's floor and against what else is installed."""
