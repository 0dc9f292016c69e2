"""What runs without optional packages, and the sentence where it does not; the code paths of other systems."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Hides packages in a fresh interpreter, as if they were not installed, and runs a program or some lines.
HIDE = """
import importlib.abc, importlib.util, runpy, sys
hidden, program, *rest = sys.argv[1:]
hidden = hidden.split(",")
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in hidden else found(name, package)
sys.path.insert(0, ".")
sys.argv = [program, *rest]
if program == "-c":
    exec(rest[0])
elif program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""

PATCH = """
import torch, diffusers, attngen
unet = diffusers.UNet2DConditionModel(
    sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
    norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
with attngen.apply(unet, attngen.AgentAttention(num_agents=4)) as handle:
    unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 3, 8))
    print(handle.report())
pipe = attngen.SiTPipeline.from_pretrained("attngen/assets/emoji")
print(pipe("heart", num_inference_steps=1).images[0].size)
"""

# Imports every module and asks for the facts of the machine where there is neither fork nor /proc.
SYSTEM = """
import importlib, os, pathlib, sys
import torch, diffusers
try:
    import accelerate, datasets, gradio, matplotlib, torch_fidelity, transformers
except ImportError:
    pass
for name in ("fork", "sched_getaffinity", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
read = pathlib.Path.read_text
def read_text(self, *args, **kwargs):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(self)
    return read(self, *args, **kwargs)
pathlib.Path.read_text = read_text
for path in sorted(pathlib.Path(".").glob("*/**/*.py")):
    if path.parts[0] in ("attngen", "pipelines", "train", "benchmarks") and "triton" not in path.parts:
        if path.stem != "__main__":
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
from pipelines.engine.memory import PeakMemory
PeakMemory(torch.device("cpu")).read()
print("imported")
"""


def run(hidden, *command):
    return subprocess.run(
        [sys.executable, "-c", HIDE, hidden, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_library_needs_no_optional_package():
    hidden = "transformers,peft,accelerate,matplotlib,gradio,torch_fidelity,torchvision,torchmetrics,scipy,datasets"
    ran = run(hidden + ",triton,tensorboard", "-c", PATCH)
    assert ran.returncode == 0 and "agent (4)" in ran.stdout and "(32, 32)" in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("hidden", "command", "sentence"),
    [
        (
            "transformers,peft",
            ["pipelines.text2image", "fox", "--model", "nobody/nothing"],
            "pip install 'attngen[text2image]'",
        ),
        ("accelerate,peft", ["train.sit", "--preset", "emoji-tiny", "--out", "none"], "pip install 'attngen[train]'"),
        ("torch_fidelity", ["train.fid", ".", "emoji"], "pip install 'attngen[fid]'"),
        ("gradio", ["app.py"], "pip install 'attngen[app]'"),
    ],
)
def test_a_program_names_the_package_that_it_lacks(hidden, command, sentence):
    ran = run(hidden, *command)
    assert ran.returncode != 0 and sentence in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


@pytest.mark.slow
def test_modules_import_where_there_is_neither_fork_nor_proc():
    ran = run("triton", "-c", SYSTEM)
    assert ran.returncode == 0 and "imported" in ran.stdout, ran.stderr[-2000:]
