"""Two processes that stay, since to start them takes longer than a case: both run what they are sent, in one process group."""

import io
import multiprocessing
import os
import traceback
from datetime import timedelta

import torch
from conftest import free_port

PATIENCE = 120  # seconds


def _serve(rank, port, connection):
    """Run one function after the other: ``(function, arguments)`` comes in, what it returns goes back, or what was raised."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE / 2))
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            result = function(*arguments), None
        except Exception as error:
            result = None, (repr(error), traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(result, buffer)  # a pipe would share the memory of tensors instead of sending it
        connection.send_bytes(buffer.getvalue())


class Ranks:
    """Two ranks. If one does not answer in time, both are ended, and the next call starts others."""

    def __init__(self):
        self.processes, self.connections = [], []

    def _start(self):
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def call(self, function, *arguments):
        """What ``function`` returns on each rank.

        Raises:
            RuntimeError: with the messages of the ranks, if one of them raises or does not answer.
        """
        if not self.processes:
            self._start()
        try:
            for connection in self.connections:
                connection.send((function, arguments))
            answers = [self._answer(connection) for connection in self.connections]
        except (EOFError, OSError, TimeoutError) as error:
            self.close()
            raise RuntimeError(f"a rank did not answer: {error!r}") from error
        failed = [error for _, error in answers if error is not None]
        if failed:
            self.close()  # they may have stopped at different places
            raise RuntimeError("\n".join(trace for _, trace in failed))
        return [result for result, _ in answers]

    def _answer(self, connection):
        if not connection.poll(PATIENCE):
            raise TimeoutError(f"nothing came in {PATIENCE} s")
        return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)

    def close(self):
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []
