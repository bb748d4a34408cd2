"""The noise schedule and the prediction in diffusers' names, both ways: the content of a `scheduler_config.json`.

Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from schedulers.noise import RESOLUTION_SHIFT, NoiseSchedule
from schedulers.prediction import EDM_SIGNS, PREDICTIONS

READ = (  # the keys that describe the noise schedule and the prediction
    "prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
    "rescale_betas_zero_snr", "snr_shift_scale", "shift", "flow_shift", "use_flow_sigmas", "use_dynamic_shifting",
    "shift_terminal", "invert_sigmas", *RESOLUTION_SHIFT, "timestep_type", "sigma_min", "sigma_max", "sigma_data",
)  # fmt: skip

LIMITS = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def from_diffusers_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """Read (noise schedule, prediction) from the content of a diffusers `scheduler_config.json`.

    The other keys are settings of one solver of diffusers and are ignored: set_alpha_to_one of one class would break
    another. Raises ValueError for a noise schedule or a prediction that is not supported.
    """
    name = str(config.get("_class_name", "this configuration"))
    prediction = str(config.get("prediction_type", "epsilon"))

    def number(key: str, default: Any, high: float = 1e9) -> float:
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= high:
            raise ValueError(f"{name}: {key} must be a number above 0 and at most {high:g}, got {value!r}")
        return value

    T = int(number("num_train_timesteps", 1000, 100_000))
    if config.get("invert_sigmas"):
        raise ValueError(f"{name}: invert_sigmas is not supported: its flow runs from 0 to 1")
    if name.startswith("EDM") or config.get("timestep_type") == "continuous":
        signs = {"v_prediction": "edm_v", "epsilon": "edm"} if name.startswith("EDM") else {"v_prediction": "edm_v"}
        signs |= {prediction: prediction for prediction in EDM_SIGNS}
        sigma_data = number("sigma_data", 0.5 if name.startswith("EDM") else 1.0)
        noise = NoiseSchedule.edm(number("sigma_min", 0.002), number("sigma_max", 80.0), sigma_data, T)
        prediction = signs.get(prediction, f"{prediction} with continuous times")
    elif (
        config.get("use_flow_sigmas")
        or name.startswith("FlowMatch")
        or {"shift", "_class_name"} & {*config} == {"shift"}
    ):
        dynamic: dict[str, Any] | None = None
        if config.get("use_dynamic_shifting"):
            dynamic = {k: number(k, v) for k, v in RESOLUTION_SHIFT.items() if k != "time_shift_type"}
            dynamic["time_shift_type"] = "linear" if config.get("time_shift_type") == "linear" else "exponential"
            dynamic |= {key: config[key] for key in ("mu",) if config.get(key)}
        terminal = number("shift_terminal", None, 1.0) if config.get("shift_terminal") else None
        noise = NoiseSchedule.flow(number("shift" if "shift" in config else "flow_shift", 1.0), T, dynamic, terminal)
        prediction = prediction if config.get("use_flow_sigmas") else "flow_prediction"
    else:
        noise = _table(config, name, T, number)
        if config.get("snr_shift_scale"):
            noise = noise.with_snr_divided(number("snr_shift_scale", None))
        if config.get("rescale_betas_zero_snr"):
            noise = noise.zero_terminal_snr()
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name}: prediction_type {prediction!r} is not supported")
    return noise, prediction


def _table(config: Mapping[str, Any], name: str, T: int, number: Callable[..., float]) -> NoiseSchedule:
    kind = config.get("beta_schedule")
    if config.get("trained_betas") is not None:
        return NoiseSchedule.from_betas(config["trained_betas"])
    if kind == "squaredcos_cap_v2":
        return NoiseSchedule.cosine(T)
    if kind == "laplace":
        return NoiseSchedule.laplace(T)
    if kind in ("linear", "scaled_linear", "sigmoid"):
        return NoiseSchedule.named(kind, T=T, beta_start=number("beta_start", 1e-4), beta_end=number("beta_end", 0.02))
    raise ValueError(
        f"{name}: beta_schedule {kind!r} is not supported. Supported are linear, scaled_linear, squaredcos_cap_v2, "
        "laplace, sigmoid, trained_betas, and flow and EDM classes"
    )


def limits_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The limits on x0 in a diffusers configuration, as `schedulers.get` takes them."""
    if config.get("thresholding"):
        ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return {"thresholding": ratio, "sample_max_value": most}
    return {"clip_sample": config.get("clip_sample_range", 1.0)} if config.get("clip_sample") else {}


def to_diffusers_config(noise: NoiseSchedule, limits: Mapping[str, float]) -> dict[str, Any]:
    """The noise schedule and the limits on x0 in diffusers' names, as `from_diffusers_config` and `limits_of` read."""
    config: dict[str, Any] = {"clip_sample": False, "thresholding": False, **limits}
    if "clip_sample" in limits:
        config["clip_sample_range"] = limits["clip_sample"]
    if "thresholding" in limits:
        config["dynamic_thresholding_ratio"] = limits["thresholding"]
    if noise.is_flow:
        dynamic = {"use_dynamic_shifting": bool(noise.dynamic), **(noise.dynamic or RESOLUTION_SHIFT)}
        config |= {"use_flow_sigmas": True, "shift": noise.shift, "flow_shift": noise.shift, **dynamic}
        return config | {"shift_terminal": noise.terminal}
    if noise.name == "edm":
        ends = {key: noise.recipe[key] for key in ("sigma_min", "sigma_max", "sigma_data")}
        return config | {"timestep_type": "continuous", **ends}
    if noise.name in ("linear", "scaled_linear") and "snr_divided" not in noise.recipe:
        ends = {key: noise.recipe[key] for key in ("beta_start", "beta_end")}
        zero = bool(noise.recipe.get("zero_terminal_snr"))
        return config | {"beta_schedule": noise.name, **ends, "rescale_betas_zero_snr": zero}
    return config | {"trained_betas": list(noise.betas)}
