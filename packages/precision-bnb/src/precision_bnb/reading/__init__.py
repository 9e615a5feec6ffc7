"""Which layers' weights a model's own code reads: packed ones would be bytes to it.

The source of what runs in a forward is followed with the model's real modules in place of its variables: attributes,
loops over lists of modules, calls of methods and functions that a layer is handed to. Both sides of a branch are taken
unless settings that stay what they are decide it. So a layer may be named that is not read after all; it stays as it
is, which is right if larger. Where there is no source, bytecode is searched for attributes of attributes (`bytecode`).
"""

from precision_bnb.reading.reader import weight_readers as weight_readers
