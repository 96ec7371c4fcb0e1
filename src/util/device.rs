//! The devices that models are on: opening them, and their memory.

use anyhow::{Result, anyhow, ensure};
use candle_core::Device;
use serde::Serialize;

use crate::util::process;

/// The device that `name` means, as `policy.device` has it: a stream of its own on a card.
///
/// # Errors
/// When this build or this machine has no such device.
pub fn open(name: &str) -> Result<Device> {
    open_as("policy.device", name)
}

/// As [`open`], for what `key` of the configuration names.
///
/// # Errors
/// As [`open`], naming the key.
pub fn open_as(key: &str, name: &str) -> Result<Device> {
    let Some(ordinal) = name.strip_prefix("cuda:") else { return Ok(Device::Cpu) };
    ensure!(
        cfg!(feature = "cuda"),
        "{key} = \"{name}\", but this program was built without CUDA; set it to \"cpu\", or build with benches/cuda/build.sh"
    );
    // One stream for all that shares it. Candle's default is a stream for each thread, where nothing would order what the
    // learner writes before what other actors read of it.
    let device = Device::new_cuda_with_stream(ordinal.parse()?).map_err(|error| {
        // Where backtraces are asked for, candle writes one below its message.
        let error = error.to_string();
        let cause = error.lines().next().unwrap_or_default();
        anyhow!("{key} = \"{name}\" cannot be opened ({cause}); nvidia-smi -L lists the devices there are, and \"cpu\" is always there")
    })?;
    #[cfg(feature = "cuda")]
    // SAFETY: events order what happens to a tensor on different streams. Here a tensor stays on its own; what passes from
    // one to another is a copy, see `model::DeviceReplicas`.
    unsafe {
        device.as_cuda_device()?.disable_event_tracking();
    }
    Ok(device)
}

/// Memory of a card, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// As `policy.device` names it.
    pub device: String,
    /// Taken, by this process and by others.
    pub used_bytes: u64,
    /// Free.
    pub free_bytes: u64,
}

/// Memory of `device`, where it is a card and its driver tells.
#[cfg(feature = "cuda")]
pub fn memory(device: &Device) -> Option<Memory> {
    let Device::Cuda(cuda) = device else { return None };
    let stream = cuda.cuda_stream();
    let (free, total) = stream.context().mem_get_info().ok()?;
    let device = format!("cuda:{}", stream.context().ordinal());
    Some(Memory { device, used_bytes: total.saturating_sub(free) as u64, free_bytes: free as u64 })
}

/// This program knows of no card.
#[cfg(not(feature = "cuda"))]
pub fn memory(_device: &Device) -> Option<Memory> {
    None
}

/// Memory that a model on `device` may still take, where that is known.
pub fn available_bytes(device: &Device) -> Option<u64> {
    if device.is_cpu() { process::available_bytes() } else { memory(device).map(|memory| memory.free_bytes) }
}
