"""Activation-aware quantization, on text that a tokenizer of Hugging Face reads."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import onnx

import qwrap
from qwrap.nbits.awq import clip
from qwrap.ort.enums import QuantFormat
from qwrap.ort.errors import QuantizationError
from qwrap.ort.weight_only.configs import WeightOnlyQuantConfig

METHODS = ("awq_lite", "awq_clip")
DATASETS = {
    "cnn": ("cnn_dailymail", "3.0.0", "train", "article"),
    "pile": ("mit-han-lab/pile-val-backup", None, "validation", "text"),
}


class NVAWQWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """AWQ, on samples of a public text.

    Building it loads the tokenizer and the text. With inputs of one's own neither is needed:
    ``qwrap.quantize_weights(model, method="awq", batches=inputs)``.

    Attributes:
        calibration_data_reader: list of inputs.
        calibration_method: "awq_lite", which scales weights and clips ranges, or "awq_clip",
            which clips only.
    """

    def __init__(
        self,
        tokenizer_dir: str,
        dataset_name: str = "cnn",
        cache_dir: str = "./cache",
        calibration_method: str = "awq_lite",
    ) -> None:
        """Load the samples.

        Args:
            tokenizer_dir: folder, or name on the hub, of a tokenizer and its model's configuration.
            dataset_name: "cnn" or "pile".
            cache_dir: where what is loaded is kept.
            calibration_method: "awq_lite" or "awq_clip".

        Raises:
            ImportError: transformers or datasets is missing.
            QuantizationError: no such text or method (a ``ValueError``).
        """
        if calibration_method not in METHODS:
            raise QuantizationError(
                f"calibration_method '{calibration_method}': choose from {', '.join(METHODS)}"
            )
        super().__init__("nvidia_awq", QuantFormat.QDQ)
        self.calibration_method = calibration_method
        self.calibration_data_reader = self.get_calib_inputs(
            dataset_name, tokenizer_dir, cache_dir, calib_size=32, block_size=512, use_fp16=True
        )

    def make_model_input(
        self,
        config: Any,
        input_ids: Any,
        attention_mask: Any,
        add_past_kv_inputs: bool = True,
        use_fp16: bool = True,
        add_position_ids: bool = True,
    ) -> dict[str, Any]:
        """Return the inputs of a decoder for some tokens, its cache empty.

        Args:
            config: of the model.
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 for padding.
            add_past_kv_inputs: give the cache.
            use_fp16: that of a float16 model.
            add_position_ids: give the positions, 1 for padding.
        """
        ids, mask = (np.asarray(array, np.int64) for array in (input_ids, attention_mask))
        inputs = {"input_ids": ids, "attention_mask": mask}
        if add_position_ids:
            inputs["position_ids"] = np.where(mask == 0, 1, mask.cumsum(-1) - 1)
        if add_past_kv_inputs:
            heads = config.num_key_value_heads
            size = config.hidden_size // config.num_attention_heads
            empty = np.zeros((len(ids), heads, 0, size), np.float16 if use_fp16 else np.float32)
            for layer in range(config.num_hidden_layers):
                for part in ("key", "value"):
                    inputs[f"past_key_values.{layer}.{part}"] = empty
        return inputs

    def get_calib_inputs(
        self,
        dataset_name: str,
        model_name: str,
        cache_dir: str,
        calib_size: int = 32,
        block_size: int = 512,
        use_fp16: bool = True,
        add_past_kv_inputs: bool = True,
        add_position_ids: bool = True,
    ) -> list[dict[str, Any]]:
        """Return the inputs for the first samples of a text, one by one; no remote code is run.

        Args:
            dataset_name: "cnn" or "pile".
            model_name: folder or name of the tokenizer.
            cache_dir: where what is loaded is kept.
            calib_size: samples.
            block_size: tokens of a sample at most.
            use_fp16: see ``make_model_input``, as for what follows.
            add_past_kv_inputs: as there.
            add_position_ids: as there.
        """
        known = next((value for key, value in DATASETS.items() if key in dataset_name), None)
        if known is None:
            raise QuantizationError(f'dataset "{dataset_name}" not supported: "cnn" or "pile"')
        path, name, split, column = known
        transformers, datasets = (_needed(package) for package in ("transformers", "datasets"))
        config = transformers.AutoConfig.from_pretrained(model_name, cache_dir=cache_dir)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name, cache_dir=cache_dir)
        rows = datasets.load_dataset(path, name=name, split=f"{split}[:{calib_size}]")
        encoded = (
            tokenizer(text, truncation=True, max_length=block_size, return_tensors="np")
            for text in rows[column]
        )
        return [
            self.make_model_input(
                config,
                tokens["input_ids"],
                tokens["attention_mask"],
                add_past_kv_inputs,
                use_fp16,
                add_position_ids,
            )
            for tokens in encoded
        ]


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is not installed, which reads the text for AWQ; install it, or call "
            "qwrap.quantize_weights(model, method='awq', batches=...) with inputs of your own"
        ) from error


class NVAWQWeightOnlyQuantizer:
    """AWQ without foreign packages: qwrap's own."""

    def __init__(self, config: NVAWQWeightOnlyQuantConfig) -> None:
        """Take the settings."""
        self.config = config

    def quantize_awq(
        self, model: onnx.ModelProto | str | os.PathLike[str], **settings: Any
    ) -> onnx.ModelProto:
        """Return a model with blocked symmetric int4 weights in QDQ form, 128 to a block.

        Args:
            model: message or path.
            settings: of ``qwrap.quantize_weights``, such as ``exclude``, ``bits``, ``report``.

        Raises:
            ModelError: the model cannot be read or run.
            InputError: the samples do not fit it.
        """
        given: dict[str, Any] = {"form": "qdq", "symmetric": True, **settings}
        scales = self.config.calibration_method == "awq_lite"
        result = qwrap.quantize_weights(
            model,
            method="awq" if scales else clip,
            batches=self.config.calibration_data_reader,
            **given,
        )
        assert result is not None
        return result
