"""What a bundle holds after export, and what stops an export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from export.errors import ExportError
from export.graph import backbone_graph, conditioner_graph
from export.onnx import Options, export_bundle, main
from export.session import open_session, run
from export.source import open_source, parameters
from export.storage import save_graph, save_weights
from export.verify import LIMITS, Limits
from model.bundle import Bundle
from model.data import main as _unused
from tests.export.tiny import CONFIG, tiny_dit, tiny_source
