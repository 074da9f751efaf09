"""The launcher on the gradio of each of upstream's environments, in a network with no way out: its
page answers who logs in a question about a picture, asked as `health` asks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from gpufleet import ROOT, catalog

sys.path.append(str(ROOT / "tests" / "demo"))

import upstream_double

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root"),
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="numpy 1.26 and gradio 3 are for 3.11"),
]

#: What the page runs on, of all that an environment has.
PAGE = ("fastapi", "gradio", "gradio-client", "huggingface-hub", "numpy", "pydantic")

# The launcher and who asks are in one network that has nothing but loopback. $1 python of the
# environment, $2 folder of files/upstream, $3 checkout, $4 configuration, $5 picture, $6 accounts.
INSIDE = r"""
ip link set lo up
"$1" "$2/launch.py" --checkout "$3" --server-name 127.0.0.1 --server-port 7860 --max-waiting 2 \
  --model-id small --auth-file "$6" -- --cfg-path "$4" --gpu-id 0 > "$3.log" 2>&1 &
pid=$!
until curl -s http://127.0.0.1:7860/healthz | grep -q '"ok"'; do
  kill -0 $pid || { cat "$3.log" >&2; exit 1; }
  sleep 0.5
done
curl -s -o /dev/null -w '%{http_code}\n' http://127.0.0.1:7860/
python3 "$2/ask.py" http://127.0.0.1:7860 "$5" "How large is it?" 60 "$6"
kill $pid
"""


@pytest.mark.parametrize("name", [row.environment for row in catalog.upstream().versions.values()])
def test_the_page_answers_without_a_network(name: str, tmp_path: Path):
    pins = catalog.environments().environments[name].pip
    wanted = [pin for pin in pins if pin.partition("==")[0] in PAGE]
    assert any(pin.startswith("gradio==3.") for pin in wanted)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *wanted, "matplotlib<3.9"], check=True
    )
    upstream_double.write(tmp_path / "checkout")
    home = tmp_path / "home"
    config = upstream_double.surroundings(home, tmp_path / "weights")
    picture = ROOT / "files" / "weights" / "pico" / "health.png"
    accounts = tmp_path / "accounts"
    accounts.write_text("ann:a secret: word\n")
    files = ROOT / "files" / "upstream"
    words = (python, files, tmp_path / "checkout", config, picture, accounts)
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", INSIDE, "sh", *map(str, words)],
        cwd=home,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TORCH_HOME": str(home),
            "GRADIO_ANALYTICS_ENABLED": "False",
        },
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    page, answer = done.stdout.splitlines()
    assert page == "200"
    assert json.loads(answer) == {"answer": "mini_gpt4 sees 224 by 224 pixels"}
