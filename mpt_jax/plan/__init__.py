"""What a run would need on TPUs that are not here: its very steps, compiled ahead of time.

    mpt-jax plan --gin_file=gin/mpt_source.gin --topology=v5e:4x4

Reads neither data nor weights. All figures are the compiler's or counted from what it made;
nothing is run, so none of them is a speed.
"""
