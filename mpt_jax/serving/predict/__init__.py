"""`mpt-jax predict`: answers to requests that name a task each, from a bank of prompts.

functions   what is compiled: predictions and scores of token ids
backbone    the backbone and vocabulary that a bank belongs to
requests    lines of JSON into token ids, or into what is wrong with them
server      batches of like length; answers in the order of requests
stream      lines as they arrive, a window at a time
output      where answers go; a file goes on where an earlier start left off
progress    how far it is
"""

from mpt_jax.serving.predict.server import Server

__all__ = ["Server"]
