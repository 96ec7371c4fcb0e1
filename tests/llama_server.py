"""Serves a GGUF file with llama.cpp on loopback, for tests/suite/remote.rs.

    pip install xllamacpp
    python tests/llama_server.py MODEL.gguf 8191 &
    PRECEPTOR_TEST_LLAMA_SERVER=http://127.0.0.1:8191/v1 PRECEPTOR_TEST_MODELS=1 \
        cargo test --release --test suite llama_server
"""

import sys
import time

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[2])
params.n_ctx = 4096
params.n_parallel = 2
params.cpuparams.n_threads = 1
params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
while True:
    time.sleep(3600)
