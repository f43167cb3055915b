"""Use the service with OpenAI's own Python client: `pip install openai`.

make serve                                   # in another terminal
python examples/openai_client.py
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--prompt", default="a strawberry in noto style")
parser.add_argument("--out", type=Path, default=Path("openai.png"))
options = parser.parse_args()

# A service that asks for keys takes one of its own here.
client = OpenAI(base_url=f"{options.url}/v1", api_key="not-needed")
response = client.images.generate(prompt=options.prompt, n=1)
assert response.data is not None
options.out.write_bytes(base64.b64decode(response.data[0].b64_json or ""))
print(options.out)
