"""`mpt-jax predict`: answers requests from a prompt bank; each request names its task.

compiled           the compiled functions: predictions and scores of token ids
backbone           the backbone and vocabulary of a bank
requests           lines of JSON to token ids, or to an error
server             batches of similar length; answers in the order of requests
windows            lines as they arrive, in windows
resumable_output   output of answers; a file is resumed if an earlier start was interrupted
progress           progress bar or log lines
"""

from mpt_jax.serving.predict.server import Server

__all__ = ["Server"]
