"""Guards against a bad reward: pure functions on numbers, without a model.

`calibration`: do margins mean what they say. `length_bias`: is length taken for quality. `best_of_n`: where more selection by the
reward makes answers worse. `agreement`: where two levels contradict each other. `drift`: alarms while online RL runs.
`provenance`: which reward model a stage was trained with.
"""
