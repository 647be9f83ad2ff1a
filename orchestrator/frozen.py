"""Imported last by the fork server of loader processes, and by nobody else: what is loaded so far is looked at no more.

The garbage collector writes to every object that it looks at. What it leaves alone stays shared between the fork server
and its loader processes (https://docs.python.org/3/library/gc.html#gc.freeze).
"""

import gc

gc.collect()
gc.freeze()
