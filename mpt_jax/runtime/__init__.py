"""The process and its files: paths, distributed start, preemption, storage, compilation cache."""
