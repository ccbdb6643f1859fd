"""Cost of a job's steps on TPUs, computed by compiling them on a machine without TPUs.

    mpt-jax plan --gin_file=gin/mpt_source.gin --topology=v5e:4x4

The command reads neither data nor weights. All figures come from the compiler or are counted in the
compiled program. The program is not run, so no figure is a measured speed.
"""
