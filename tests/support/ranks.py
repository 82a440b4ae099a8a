"""Several ranks on one machine, as forks of the process that runs the tests: no second import of torch."""

import multiprocessing
import os
import queue
import socket
import time
import traceback

import torch

DIED = "died"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(world, work, *arguments, timeout=120, **environment):
    """Calls work(*arguments) in `world` processes that torchrun might have started.

    Returns what each raised, in words; None where it returned, an exit status where it ended by one, DIED
    where it was killed (or did not end in time).
    """
    port = free_port()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, results, work, arguments, environment))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    found, deadline = {}, time.monotonic() + timeout
    try:
        while len(found) < world and time.monotonic() < deadline:
            alive = any(process.is_alive() for process in ranks)
            try:
                rank, outcome = results.get(timeout=0.5)
                found[rank] = outcome
            except queue.Empty:
                if not alive:
                    break
    finally:
        for process in ranks:
            process.join(timeout=5 if len(found) == world else 0)
            process.kill()
    return [found.get(rank, DIED) for rank in range(world)]


def _rank(rank, world, port, results, work, arguments, environment):
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "GLOO_SOCKET_IFNAME": "lo",
        **environment,
    }
    from lightning.pytorch.utilities import rank_zero_only

    from sae import exits

    rank_zero_only.rank = rank
    exits._PATIENCE_S = 0.5  # nobody ends these ranks when one of them fails
    outcome = None
    try:
        work(*arguments)
    except SystemExit as error:
        outcome = error.code
    except BaseException:  # noqa: BLE001 - whatever ended it is reported
        outcome = traceback.format_exc()[-2000:]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    results.put((rank, outcome))
    results.close()
    results.join_thread()
    os._exit(0)  # what the parent has registered for its own end is none of this process's business
