"""Kernels for the tests, forked from one process that has imported what is heavy: each would take 13 seconds to.

    python kernels.py SOCKET              # imports, then forks a kernel for each one that asks
    python kernels.py SOCKET ARGUMENT...  # what a kernel's specification starts: asks, and lives as long as the kernel

A forked kernel is a fresh one otherwise: no room of gradmm is imported yet, and its random numbers are its own.
"""

import json
import os
import signal
import socket
import sys

HEAVY = """
    ipykernel.kernelapp matplotlib.widgets matplotlib.backends.backend_agg pandas.io.formats.style datasets
    dp_accounting.pld scipy.optimize scipy.stats sklearn.feature_extraction.text sklearn.metrics
    transformers.modeling_utils transformers.optimization transformers.models.gpt2.modeling_gpt2
    transformers.models.llama.modeling_llama
""".split()


def serve(place: str) -> None:
    """Import, listen at a socket and fork a kernel at each call."""
    import gc
    import importlib

    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # or the collector would write to pages that all kernels share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(place)
        listener.listen()
        while True:
            asking, _ = listener.accept()
            if asking.recv(1, socket.MSG_PEEK) and not os.fork():  # others only look whether somebody listens
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                become_kernel(asking)
                sys.exit()
            asking.close()


def become_kernel(asking: socket.socket) -> None:
    """Run a kernel with the folder, environment, arguments and streams of the process that asks, and end with it."""
    import random
    import runpy
    import threading

    import numpy
    import torch

    request, streams, *_ = socket.recv_fds(asking, 1 << 20, 3)
    folder, environment, sys.argv = json.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for seed in (random.seed, numpy.random.seed, torch.seed):
        seed()
    threading.Thread(target=lambda: (asking.recv(1), os._exit(1)), daemon=True).start()
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)


def ask(place: str, arguments: list[str]) -> None:
    """Have a kernel forked and wait for its end; where nobody listens, start one as usual."""
    watched = "--IPKernelApp.parent_handle=1"  # a kernel watches the process that started it, which is another one here
    request = json.dumps([os.getcwd(), dict(os.environ), ["ipykernel_launcher", *arguments, watched]]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as kernel:
        try:
            kernel.connect(place)
        except OSError:
            os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *arguments])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # comes before the end of every kernel, which is told another way
        socket.send_fds(kernel, [request], [0, 1, 2])
        kernel.recv(1)


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:]) if sys.argv[2:] else serve(sys.argv[1])
