"""How much memory there is, and how much of it a forward holds."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bnfix.running import Footprint, free_bytes, parse_bytes
from bnfix.running.memory import UNKNOWN, available_on_cpu

INSTALLED = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
KIB = torch.zeros(256)  # a storage of one KiB that was there before


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        (1, 1),
        (3 << 40, 3 << 40),
        ("1000", 1000),
        ("9007199254740993", 9007199254740993),  # 2^53 + 1: no detour by floats
        ("2GB", 2_000_000_000),
        ("2 gb", 2_000_000_000),
        ("2G", 2_000_000_000),
        ("512MiB", 512 << 20),
        ("1.5KiB", 1536),
        ("0.5TB", 500_000_000_000),
        (" 7B ", 7),
    ],
)
def test_amounts_of_memory(text: int | str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["", "GB", "2XB", "-2GB", "2GB2", "1e9", "50%", "2 G B", "nan", "inf", "1,5GB", "٣GB", True, None, 2.5]
)
def test_what_is_no_amount_of_memory(text: object) -> None:
    with pytest.raises(ValueError, match="is no amount of memory such as 2GB"):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [0, -1, "0", "0GB", "0.0001KB"])
def test_no_memory_at_all(text: int | str) -> None:
    with pytest.raises(ValueError, match=r"leaves no memory at all"):
        parse_bytes(text)


def _system(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1000 kB\nCached: 5 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _v2(folder: str, limit: str, used: int, inactive: int) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\nactive_file 77\ninactive_file {inactive}\n",
    }


def test_cpu_has_what_the_system_calls_available(tmp_path: Path) -> None:
    assert available_on_cpu(_system(tmp_path)) == 1000 * 1024


def test_limit_of_a_container_counts_without_its_file_cache(tmp_path: Path) -> None:
    files = _v2("sys/fs/cgroup", "900000", 500_000, 200_000)
    assert available_on_cpu(_system(tmp_path, **{"proc/self/cgroup": "0::/\n"}, **files)) == 600_000


def test_limit_may_be_that_of_a_group_further_up(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
        **_v2("sys/fs/cgroup/slurm/job_7/step_0", "max", 10, 0),
        **_v2("sys/fs/cgroup/slurm/job_7", "300000", 100_000, 1_000),
        **_v2("sys/fs/cgroup/slurm", "800000", 100_000, 0),
    }
    assert available_on_cpu(_system(tmp_path, **files)) == 201_000


def test_path_of_the_host_inside_a_container_leads_to_its_root(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/../../docker/abc\n", **_v2("sys/fs/cgroup", "70000", 60_000, 0)}
    assert available_on_cpu(_system(tmp_path, **files)) == 10_000


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/jobs/a:b"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/jobs\n4:memory:/jobs/a:b\n0::/\n",
        f"{folder}/memory.limit_in_bytes": "500000",
        f"{folder}/memory.usage_in_bytes": "450000",
        f"{folder}/memory.stat": "inactive_file 1\ntotal_inactive_file 40000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",  # no limit, as the kernel writes it
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "7",
    }
    assert available_on_cpu(_system(tmp_path, **files)) == 90_000


def test_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **_v2("sys/fs/cgroup", "1000", 2_000, 0)}
    assert available_on_cpu(_system(tmp_path, **files)) == 0


LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max data size             {:<20} 999999999            bytes
Max resident set          1                    1                    bytes
Max address space         {:<20} unlimited            bytes
"""
STATUS = "Name:\tpython\nVmPeak:\t     999 kB\nVmSize:\t     500 kB\nVmData:\t     100 kB\nVmStk:\t 1 kB\n"


@pytest.mark.parametrize(
    ("data", "space", "left"),
    [
        ("unlimited", "unlimited", 1000 << 10),
        ("unlimited", 900 << 10, 400 << 10),
        (300 << 10, "unlimited", 200 << 10),
        (300 << 10, 600 << 10, 100 << 10),
        (1 << 40, 1 << 40, 1000 << 10),
        ("unlimited", 400 << 10, 0),  # more is in use than the limit, which came later
    ],
)
def test_limits_of_the_process_itself(tmp_path: Path, data: object, space: object, left: int) -> None:
    files = {"proc/self/limits": LIMITS.format(data, space), "proc/self/status": STATUS}
    assert available_on_cpu(_system(tmp_path, **files)) == left


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux knows them")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_what_a_real_limit_leaves_can_be_had_and_not_much_more(limit: str) -> None:
    code = f"""
import resource, torch
from bnfix.running import free_bytes
cpu = torch.device("cpu")
torch.empty(1 << 22).fill_(1)
used = next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith("{_USED[limit]}")) << 10
resource.setrlimit(resource.{limit}, (used + (300 << 20), resource.RLIM_INFINITY))
left = free_bytes(cpu)
assert 280 << 20 < left <= 320 << 20, left
held = torch.empty(left - (40 << 20), dtype=torch.uint8)
try:
    torch.empty(left + (40 << 20), dtype=torch.uint8)
except RuntimeError as error:
    print("full:", "allocate memory" in str(error), free_bytes(cpu) < 80 << 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "full: True True\n", done.stderr


_USED = {"RLIMIT_AS": "VmSize:", "RLIMIT_DATA": "VmData:"}


def test_system_that_tells_nothing_has_half_of_what_is_installed(tmp_path: Path) -> None:
    assert available_on_cpu(tmp_path) == INSTALLED // 2


def test_this_machine_has_some_and_no_more_than_is_installed() -> None:
    assert 1 << 20 < free_bytes(torch.device("cpu")) <= INSTALLED
    assert free_bytes(torch.device("xpu")) == UNKNOWN


@pytest.mark.gpu
def test_cuda_counts_the_unused_cache_as_free() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = free_bytes(device)
    held = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) == 1 << 28
    del held
    assert free_bytes(device) == before  # in the allocator's cache, of use to nobody else
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------- footprint


def test_storage_counts_once_with_its_views_until_the_last_is_gone() -> None:
    with Footprint() as held:
        a = torch.empty(256)
        assert held.now() == 1024
        view, again = a[10:20], a.reshape(16, 16).t()
        a.add_(1)
        a.mul_(2).relu_()
        assert held.now() == 1024
        del a, view
        assert held.now() == 1024
        del again
        assert held.now() == 0
    assert held.peak == 1024


def test_storages_from_outside_never_count() -> None:
    x = KIB.clone()
    with Footprint() as held:
        views = x[3:], x.view(4, 64), x.add_(1), torch.relu_(x), x.detach()
        torch.add(x, 1, out=x)
        assert (held.now(), held.peak) == (0, 0)
        y = x + 1
        assert held.now() == 1024
        del x, views
        assert held.now() == 1024
    assert y.numel() == 256


def test_peak_holds_inputs_and_outputs_of_an_operation_together() -> None:
    with Footprint() as held:
        x = torch.ones(256)
        for _ in range(5):
            x = x * 2  # the old one goes when the name is taken
        assert held.now() == 1024
    assert held.peak == 2048


def test_excluded_tensors_do_not_count_whenever_they_were_made() -> None:
    with Footprint([KIB]) as held:
        out = KIB.expand(4, 256)
        assert held.now() == 0
        made = torch.tensor([1.0, 2.0])
        assert held.now() == 8
    assert (out.shape, made.sum()) == ((4, 256), 3)


def test_storage_that_grows_counts_with_its_new_size() -> None:
    with Footprint() as held:
        x = torch.empty(4)
        x.resize_(256)
        assert held.now() == 1024


def test_address_that_is_used_again_is_another_storage() -> None:
    with Footprint() as held:
        for _ in range(50):
            x = torch.empty(1000)
            assert held.now() == 4000
            del x
            assert held.now() == 0
            y = torch.tensor([1.0] * 300)
            assert held.now() == 1200
            del y
    assert held.peak == 4000


def test_what_backward_keeps_counts_until_it_ran() -> None:
    x = torch.ones(256, requires_grad=True)
    with Footprint() as held:
        y = (x.exp() * 2).sin().sum()  # kept: exp's output, sin's input, and the sum of four bytes
        assert held.now() == 2 * 1024 + 4
        y.backward()
        gc.collect()
        assert held.now() == 1024 + 4  # the gradient and the sum
    assert torch.allclose(x.grad, 2 * x.exp().mul(2).cos() * x.exp())  # type: ignore[arg-type]


def test_other_layouts_do_not_trip_it() -> None:
    with Footprint() as held:
        dense = torch.eye(16).to_sparse().to_dense()
        assert held.now() >= 1024
    assert dense.sum() == 16


def _at_norms(model: nn.Module, x: Tensor) -> tuple[dict[str, int], Footprint]:
    """What is alive as each norm is called, and the whole forward's footprint."""
    found: dict[str, int] = {}
    held = Footprint()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda *_, name=name: found.__setitem__(name, held.now()))  # type: ignore[misc]
    with held, torch.no_grad():
        model(x)
    return found, held


def _sites_of_resnet18(batch: int, side: int) -> dict[str, int]:
    """By hand, in float32 without gradients: the names of the frames that are on the stack hold what is alive.

    ``ResNet.forward`` holds the input of a layer, ``BasicBlock.forward`` that of the block (the same in the first
    block) and its current value. In the branch of the second convolution the first one's output is gone by then; in
    ``downsample`` the second one's is alive beside it.
    """
    stage = [4 * batch * 64 * 2**i * (side // 2 ** (2 + i)) ** 2 for i in range(4)]  # bytes of a layer's output
    expected = {"bn1": 4 * stage[0]}  # 64 channels at half the side, twice that of layer1 each way
    for i, size in enumerate(stage):
        before = stage[i - 1] if i else size
        for norm in ("bn1", "bn2"):
            expected[f"layer{i + 1}.0.{norm}"] = before + size
            expected[f"layer{i + 1}.1.{norm}"] = before + 2 * size
        if i:
            expected[f"layer{i + 1}.0.downsample.1"] = before + 2 * size
    return expected


@pytest.mark.parametrize(("batch", "side"), [(2, 64), (3, 96)])
def test_resnet18_holds_at_every_norm_what_can_be_counted_by_hand(batch: int, side: int) -> None:
    models = pytest.importorskip("torchvision.models")
    found, held = _at_norms(models.resnet18().eval(), torch.randn(batch, 3, side, side))
    assert found == _sites_of_resnet18(batch, side)
    assert held.peak == 2 * found["bn1"]  # bn1's input and output
    assert held.now() == 0


@pytest.mark.gpu
def test_cuda_allocator_agrees() -> None:
    models = pytest.importorskip("torchvision.models")
    model, x = models.resnet18().eval().cuda(), torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        model(x)  # workspaces that stay
    before = torch.cuda.memory_allocated()
    real: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda *_, name=name: real.__setitem__(name, torch.cuda.memory_allocated() - before)  # type: ignore[misc]
            )
    found, _ = _at_norms(model, x)
    assert found == real  # every tensor here is a multiple of the allocator's 512 bytes
