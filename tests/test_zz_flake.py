import importlib, multiprocessing, os, signal, time
import pytest
from tests.runner import fork, text_rows
from tests.test_resume import stop_at
@pytest.mark.parametrize("n", range(8))
def test_it(n, make_run):
    run = make_run("llava", None, num_epochs=2, save_steps=1, dataloader_num_workers=1)
    def kill_workers():
        print("KILLING", [w.pid for w in multiprocessing.active_children()], flush=True)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
    a=time.time()
    child = fork("05_train", "run", before=stop_at(importlib.import_module("05_train"), "forward_loss", 3, how=kill_workers)).wait()
    print("FLAKE", n, child.code, time.time()-a, repr(child.said[-900:]))
