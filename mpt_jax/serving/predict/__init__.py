"""`mpt-jax predict`: answers requests from a prompt bank; each request names its task.

compiled           the compiled functions, which predict and score token ids
backbone           the backbone and vocabulary of a bank
requests           parser of requests: JSON lines become token ids or an error
server             batches requests of similar length, and answers in the order of requests
windows            groups input lines as they arrive
resumable_output   output of answers; an interrupted file is resumed
progress           progress bar or log lines
"""

from mpt_jax.serving.predict.server import Server

__all__ = ["Server"]
