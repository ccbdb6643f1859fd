"""Cost of a run's steps on TPUs, from compiling them ahead of time on a machine without TPUs.

    mpt-jax plan --gin_file=gin/mpt_source.gin --topology=v5e:4x4

It reads neither data nor weights. All figures come from the compiler or are counted from the
compiled program. Nothing is run, so no figure is a measured speed.
"""
