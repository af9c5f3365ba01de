"""Serves a GGUF file by llama.cpp, as the package xllamacpp has it: llama_server.py FILE PORT. Runs until ended."""

import sys
import threading

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.hostnames = ["127.0.0.1"]
parameters.n_ctx, parameters.n_parallel = 1024, 1
parameters.verbosity = 4  # the log tells the size of the cache
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
# As precise as the comparison with fp32; the default is float16.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
threading.Event().wait()
