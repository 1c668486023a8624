"""Laws: what must hold of any dialogue, tree, weight, length and budget, tried on random ones; and what readers refuse.

Cases come from a fixed seed, so that a run repeats the one before. `DIALOG_JAX_LAWS=long` tries fifty times as many
and new ones each time; what fails is kept in `.hypothesis/` and tried first the next time.
"""
