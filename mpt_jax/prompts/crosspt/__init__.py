"""CrossPT: prompts composed of source prompts by a router."""
