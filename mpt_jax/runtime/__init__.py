"""Process setup and files: paths, distributed start, preemption, storage, compilation cache."""
