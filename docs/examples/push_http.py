"""Publish weights with nothing but HTTP and a folder that both sides see.

    python docs/examples/push_http.py --folder CHECKPOINT --url http://127.0.0.1:30000

SGLang's routes: requests that are in flight wait, keep their tokens and go on under the new
weights. No package of this project is needed on the trainer's side.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST a JSON object; an error status raises with the server's own message."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            reply: dict[str, Any] = json.load(response)
            return reply
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from error


arguments = argparse.ArgumentParser()
arguments.add_argument("--folder", type=Path, required=True, help="a folder of safetensors files")
arguments.add_argument("--url", required=True)
arguments.add_argument("--version", default="1")
options = arguments.parse_args()

post(f"{options.url}/pause_generation", {"mode": "retract"})
update = {"model_path": str(options.folder.resolve()), "weight_version": options.version}
print(post(f"{options.url}/update_weights_from_disk", update))
post(f"{options.url}/continue_generation", {})
sampling = {"temperature": 0.0, "max_new_tokens": 8}
reply = post(f"{options.url}/generate", {"input_ids": [1, 2, 3], "sampling_params": sampling})
print(reply["output_ids"], "sampled by version", reply["meta_info"]["weight_version"])
