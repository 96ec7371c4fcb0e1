//! Compute devices: opening them, and their memory.

use anyhow::{Result, anyhow, ensure};
use candle_core::Device;
use serde::Serialize;

use crate::util::process;

/// Opens the device that `policy.device` names, with a separate CUDA stream on a GPU.
///
/// # Errors
/// If this build or this machine does not have the device.
pub fn open(name: &str) -> Result<Device> {
    open_as("policy.device", name)
}

/// Opens the device `name`, which the configuration key `key` names.
///
/// # Errors
/// If this build or this machine does not have the device. The error names the key.
pub fn open_as(key: &str, name: &str) -> Result<Device> {
    let Some(ordinal) = name.strip_prefix("cuda:") else { return Ok(Device::Cpu) };
    ensure!(
        cfg!(feature = "cuda"),
        "{key} = \"{name}\", but this program was built without CUDA; set it to \"cpu\", or build with benches/cuda/build.sh"
    );
    // One stream for all actors that share the device. Candle's default is a stream per thread, which would not order
    // the learner's writes before other actors' reads.
    let device = Device::new_cuda_with_stream(ordinal.parse()?).map_err(|error| {
        // With backtraces enabled, candle appends one to its message.
        let error = error.to_string();
        let cause = error.lines().next().unwrap_or_default();
        anyhow!("{key} = \"{name}\" cannot be opened ({cause}); nvidia-smi -L lists the available devices, and \"cpu\" is always available")
    })?;
    #[cfg(feature = "cuda")]
    // SAFETY: events order accesses to a tensor from different streams. Here a tensor is only used on its own stream;
    // data pass from one stream to another as copies, see `model::DeviceReplicas`.
    unsafe {
        device.as_cuda_device()?.disable_event_tracking();
    }
    Ok(device)
}

/// Memory usage of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Name of the device, as in `policy.device`.
    pub device: String,
    /// Used bytes, by this process and others.
    pub used_bytes: u64,
    /// Free bytes.
    pub free_bytes: u64,
}

/// Returns the memory usage of `device`, or `None` if it is not a GPU or the driver does not report it.
#[cfg(feature = "cuda")]
pub fn memory(device: &Device) -> Option<Memory> {
    let Device::Cuda(cuda) = device else { return None };
    let stream = cuda.cuda_stream();
    let (free, total) = stream.context().mem_get_info().ok()?;
    let device = format!("cuda:{}", stream.context().ordinal());
    Some(Memory { device, used_bytes: total.saturating_sub(free) as u64, free_bytes: free as u64 })
}

/// Returns `None`, because this build does not support GPUs.
#[cfg(not(feature = "cuda"))]
pub fn memory(_device: &Device) -> Option<Memory> {
    None
}

/// Returns the free memory of `device` in bytes, if known.
pub fn available_bytes(device: &Device) -> Option<u64> {
    if device.is_cpu() { process::available_bytes() } else { memory(device).map(|memory| memory.free_bytes) }
}
