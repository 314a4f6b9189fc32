"""Params split over devices: each part is that of the whole, takes the memory predicted, and computes the same.

Eight simulated devices, and two processes with two each, in processes of their own.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import clip_jax
from clip_jax.convert import convert
from clip_jax.params.quantize import SCHEMES
from clip_jax.params.shapes import param_shapes
from clip_jax.params.shard import batch_sharding, idle_axes, over_auto_axes, param_shardings
from tests.sharding.small import CLIP, PROMPTS, T5, device_bytes, encode, outputs, write_small

TOLERANCE = 1e-5  # partial sums are added in another order
ROOT = Path(__file__).parents[2]
FC1, FC2 = (f"text_model/encoder/layers/0/mlp/{name}/kernel" for name in ("fc1", "fc2"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small pipelines, one of them converted too, and what one device makes of the prompts."""
    folder = tmp_path_factory.mktemp("sharding")
    for name in ("sd15", "sdxl", "flux"):
        encoder = clip_jax.load(write_small(folder / name, name), family=name)
        np.savez(folder / f"{name}.npz", **{key: np.asarray(a) for key, a in outputs(encode(encoder, PROMPTS)).items()})
    convert(folder / "flux", folder / "flux orbax")
    return folder


def start(module, *arguments, devices):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", f"tests.sharding.{module}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def result(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def devices(sources):
    return result(start("devices", sources, devices=8))


@pytest.fixture(scope="module")
def processes(sources):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start("processes", sources, process, port, devices=2) for process in range(2)]
    return [result(process) for process in both]


CASES = [
    "clip, data",
    "clip, tensor",
    "clip, both",
    "flux, both",
    "flux, fsdp",
    "sdxl, both",
    "sdxl, maxdiffusion",
]


@pytest.mark.parametrize("case", CASES)
def test_parts_are_those_of_the_whole_and_compute_the_same(devices, case):
    found = devices[case]
    assert found["same params"]
    assert found["error"] <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_each_device_holds_what_was_predicted(devices, case):
    found = devices[case]
    assert set(found["bytes"]) == {found["predicted"]}
    assert found["arguments"] >= 0.5 * found["predicted"]


def test_data_alone_copies_params_and_sends_only_the_result(devices):
    """Unconditional rows first is another order than that of the devices, each of which has some of both halves."""
    found = devices["clip, data"]
    assert found["predicted"] == 4 * sum(map(int, map(np.prod, param_shapes(CLIP).values())))
    assert found["collectives"] == {"all-gather": 1}


def test_tensor_parallel_adds_once_per_half_block(devices):
    """Megatron's pattern (Shoeybi et al. 2019, section 3): a sum after attention, and one after the feed-forward."""
    found = devices["clip, tensor"]
    assert found["predicted"] < 0.3 * devices["clip, data"]["predicted"]
    assert set(found["collectives"]) == {"all-reduce"}
    assert found["collectives"]["all-reduce"] <= 2 * CLIP.num_hidden_layers + 1  # and one for the token embedding


def test_what_is_split_in_another_way_is_seen(devices):
    """The controls: one kernel whole on every device, and one split by columns."""
    right, wrong = devices["flux, both"], devices["controls"]
    assert wrong["whole"]["bytes"] > right["predicted"]
    assert wrong["columns"]["bytes"] == right["predicted"]
    assert wrong["columns"]["collectives"] != right["collectives"]


def test_one_prompt_runs_where_rows_do_not_divide(devices):
    assert devices["one prompt"]["error"] <= TOLERANCE


def test_what_is_split_can_be_saved_and_read_in_another_way(devices):
    assert devices["saved"] == {"whole": True, "split": True}


def test_casting_part_by_part_is_casting_the_whole(devices):
    low = devices["low"]
    assert low["flux"] == low["flux orbax"] == [True, low["predicted"]]


@pytest.mark.parametrize(("tower", "config"), [("clip_l", CLIP), ("t5", T5)])
def test_flax_rules_shard_the_drop_in_classes(devices, tower, config):
    """`nn.logical_to_mesh_sharding` of what `init_weights` says, by the rules of the pipeline."""
    found = devices["compat"][tower]
    assert found["same params"]
    assert found["error"] <= TOLERANCE
    shapes = {path: 4 * int(np.prod(shape)) for path, shape in param_shapes(config).items()}
    tables = sum(size for path, size in shapes.items() if "embedding" in path)  # by the two of fsdp: no rule for vocab
    kernels = sum(size for path, size in shapes.items() if path.endswith("kernel"))  # by all eight
    rest = sum(shapes.values()) - tables - kernels
    assert max(found["bytes"]) <= tables / 2 + kernels / 8 + rest


def test_params_may_leave_the_mesh(devices):
    assert devices["moved"] <= TOLERANCE


def test_encoders_of_a_mesh_are_pickled_and_copied(devices):
    assert max(devices["pickled"]["errors"].values()) <= TOLERANCE
    assert devices["pickled"]["rows"]


def test_params_stay_on_the_device_that_was_the_default(devices):
    assert devices["default"] == ["{CpuDevice(id=3)}"] * 2


def test_a_warmup_compiles_what_a_mesh_runs(devices):
    """One program: no rows are looked for there, so that no prompts are encoded alone."""
    assert devices["warmed"] == [1, 1]


def test_what_another_mesh_has_computed_is_not_returned(devices):
    assert devices["meshes"] == [True, True]


def test_a_mesh_with_explicit_axes_may_be_in_force(devices):
    assert max(devices["explicit"].values()) <= TOLERANCE


def test_params_of_a_wrapper_go_to_a_mesh_and_back(devices):
    found = devices["compat"]["placed"]
    assert found["devices"] == [8, 1]
    assert found["error"] <= TOLERANCE


@pytest.mark.parametrize("name", list(SCHEMES))
def test_quantised_params_are_split_as_others_are(devices, name):
    """Scales go with what they scale, whether parts are quantised as they are read or were before."""
    found = devices["quantized"][name]
    assert found["same params"]
    assert found["same shardings"]
    assert len({size for sizes in found["bytes"] for size in sizes}) == 1
    # A sum in another order may round an activation to another step: what counts is the error to float32.
    assert max(found["errors"].values()) <= 1.2 * found["errors"]["one"]


def test_every_number_of_a_source_is_read_once(devices):
    reads = devices["reads"]
    assert reads["numbers"] == reads["parameters"]
    assert reads["fc1"] == [CLIP.hidden_size * CLIP.intermediate_size // 4]


def test_parts_are_copies_that_are_read_once(devices):
    assert devices["copies"] == {"asked": 4, "same": True}


def test_two_processes_share_a_mesh(processes):
    for found in processes:
        assert found["devices"] == [4, 2]
        for source in ("flux", "flux orbax"):
            assert found[source]["same params"]
            assert found[source]["error"] <= TOLERANCE
            assert len(set(found[source]["bytes"])) == 1
        assert found["one prompt"] <= TOLERANCE
        assert "expected to be written by one process, found 2" in found["save"]


# --- the plan, without devices

MESH = AbstractMesh((2, 4), ("data", "tensor"))


def test_kernels_are_split_as_megatron_does():
    found = param_shardings({"clip_l": CLIP}, MESH)["clip_l"]
    assert found[FC1].spec == PartitionSpec(None, "tensor")
    assert found[FC2].spec == PartitionSpec("tensor", None)
    assert batch_sharding(MESH).spec == PartitionSpec("data", None)


def test_heads_are_not_cut():
    """FLUX's CLIP-L has 12 heads of 64: eight devices could split the 768 columns, but not the heads."""
    config = clip_jax.FAMILIES["flux"].tower("clip_l").config
    found = param_shardings({"clip_l": config}, AbstractMesh((8,), ("tensor",)))["clip_l"]
    assert found["text_model/encoder/layers/0/self_attn/q_proj/kernel"].spec == PartitionSpec(None, None)
    assert found[FC1].spec == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("count", [2, 4, 8])
def test_t5_xxl_takes_an_nth_of_the_memory(count):
    configs = {"t5": clip_jax.FAMILIES["flux"].tower("t5").config}
    mesh = AbstractMesh((count,), ("tensor",))
    whole = 2 * sum(map(int, map(np.prod, param_shapes(configs["t5"]).values())))
    assert device_bytes(configs, param_shardings(configs, mesh), "bfloat16") < 1.001 * whole / count


def test_an_axis_that_splits_nothing_is_told():
    mesh = AbstractMesh((2, 7), ("data", "tensor"))
    assert idle_axes(param_shardings({"clip_l": CLIP}, mesh)) == ["tensor"]
    assert idle_axes(param_shardings({"clip_l": CLIP}, MESH)) == []


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("embed", "model")], r"The rules split over model; the mesh has the axes data, tensor"),
        ([("embed",)], "Expected rules as pairs"),
        (7, "Expected rules as pairs"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
    with pytest.raises(clip_jax.ClipJaxError, match=message):
        param_shardings({"clip_l": CLIP}, MESH, rules)


def test_rules_may_be_an_iterator(sources):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    rules = iter([("batch", "data"), ("embed", "tensor")])
    loaded = clip_jax.load(sources / "sd15", family="sd15", mesh=mesh, rules=rules)
    assert loaded.batch_sharding.spec[0] == "data"


def test_a_mesh_of_other_names_wants_rules():
    with pytest.raises(clip_jax.ClipJaxError, match=r"Expected a mesh with an axis data, fsdp or tensor; .* x\. Pass"):
        param_shardings({"clip_l": CLIP}, AbstractMesh((2,), ("x",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mesh": "tensor"}, "Expected mesh to be a jax.sharding.Mesh, found str"), ({"rules": []}, "pass mesh= as well")],
)
def test_load_refuses_what_is_no_mesh(sources, options, message):
    with pytest.raises(clip_jax.ClipJaxError, match=message):
        clip_jax.load(sources / "sd15", family="sd15", **options)


def test_one_device_is_a_mesh_too(sources):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    encoder = clip_jax.load(sources / "sd15", family="sd15", mesh=mesh)
    reference = clip_jax.load(sources / "sd15", family="sd15")
    np.testing.assert_array_equal(encoder("a cat").prompt_embeds, reference("a cat").prompt_embeds)


def test_wo_of_t5_counts_as_float32_in_float16():
    configs = {"t5": clip_jax.FAMILIES["flux"].tower("t5").config}
    shardings = param_shardings(configs, AbstractMesh((2,), ("tensor",)))
    wo = sum(np.prod(shape) for path, shape in param_shapes(configs["t5"]).items() if path.endswith("wo/kernel"))
    assert device_bytes(configs, shardings, "float16") == device_bytes(configs, shardings, "bfloat16") + 2 * wo // 2


def test_the_kind_of_memory_stays():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    for kind in kinds:
        assert over_auto_axes(NamedSharding(mesh, PartitionSpec(), memory_kind=kind)).memory_kind == kind
    assert len(kinds) > 1
