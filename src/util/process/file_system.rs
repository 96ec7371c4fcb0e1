//! Types of file systems.

use std::path::Path;

/// Returns whether `path` is on a network file system, where processes of several machines may open a file but cannot
/// share memory through it.
#[cfg(target_os = "linux")]
pub fn is_shared(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let folder = path.parent().unwrap_or(path);
    let Ok(folder) = std::ffi::CString::new(folder.as_os_str().as_bytes()) else { return false };
    // SAFETY: all zeros is a valid value of this structure of numbers.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `folder` ends with a zero byte, and `about` is a valid place to write to.
    let done = unsafe { libc::statfs(folder.as_ptr(), &raw mut about) };
    done == 0 && is_network(about.f_type as u32)
}

#[cfg(not(target_os = "linux"))]
pub fn is_shared(_path: &Path) -> bool {
    false
}

/// Returns whether the file system type `kind` (of `statfs(2)`) is a network file system (NFS, SMB, CIFS, SMB2, AFS,
/// Ceph, Lustre, GPFS, 9P) or may be one (FUSE).
#[cfg(target_os = "linux")]
fn is_network(kind: u32) -> bool {
    const KINDS: [u32; 10] = [
        0x6969,
        0x517b,
        0xff53_4d42,
        0xfe53_4d42,
        0x5346_414f,
        0x00c3_6400,
        0x0bd0_0bd0,
        0x4750_4653,
        0x0102_1997,
        0x6573_5546,
    ];
    KINDS.contains(&kind)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn file_systems_of_networks_are_recognized_by_their_type() {
        // NFS, CIFS, ext4 and tmpfs, from linux/magic.h.
        assert_eq!([0x6969, 0xff53_4d42, 0xef53, 0x0102_1994].map(is_network), [true, true, false, false]);
    }
}
