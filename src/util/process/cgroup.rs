//! Memory and CPU limits of the process's control groups, of versions 1 and 2.
//!
//! The limits of all ancestors apply, so all groups from the process's own up to the root of the mount are read.
//! Missing or unreadable files set no limit.

use std::path::{Path, PathBuf};

/// Limits of control groups; `None` without a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    /// The memory limit of the group with the least free memory.
    pub memory: Option<Memory>,
    /// CPU quota in cores, such as 1.5.
    pub cores: Option<f64>,
}

/// A memory limit of a control group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Limit in bytes.
    pub limit: u64,
    /// Free memory below the limit in bytes. Caches that the kernel can reclaim count as free.
    pub free: u64,
}

/// Returns the limits of this process's control groups.
pub fn limits() -> Limits {
    read(Path::new("/"))
}

/// Returns the limits in the file tree at `root`, which contains `proc` and `sys` in the kernel's layout.
fn read(root: &Path) -> Limits {
    let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let mounts = mounts(&text("proc/self/mountinfo"));
    let groups = groups(&text("proc/self/cgroup"));
    let mut limits = Limits::default();
    for mount in &mounts {
        let Some(group) = groups.iter().find(|group| mount.holds(group)) else { continue };
        for dir in mount.levels(root, &group.path) {
            let memory = if mount.controllers.is_empty() { memory_v2(&dir) } else { memory_v1(&dir) };
            let cores = if mount.controllers.is_empty() { cores_v2(&dir) } else { cores_v1(&dir) };
            limits.memory = [limits.memory, memory].into_iter().flatten().min_by_key(|memory| memory.free);
            limits.cores = [limits.cores, cores].into_iter().flatten().min_by(f64::total_cmp);
        }
    }
    limits
}

/// A line of `/proc/self/cgroup`.
#[derive(Debug, PartialEq)]
struct Group {
    /// Names of the controllers; empty for version 2.
    controllers: Vec<String>,
    path: String,
}

fn groups(text: &str) -> Vec<Group> {
    let group = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let controllers = parts.next()?.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        Some(Group { controllers, path: parts.next()?.to_owned() })
    };
    text.lines().filter_map(group).collect()
}

/// A mounted file system of control groups, from `/proc/self/mountinfo`.
#[derive(Debug, PartialEq)]
struct Mount {
    /// Path of the group at the root of the mount.
    root: String,
    /// Mount point.
    at: PathBuf,
    /// Controllers of version 1; empty for version 2.
    controllers: Vec<String>,
}

fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, at) = (unescaped(place.next()?), unescaped(place.next()?));
        let mut kind = kind.split(' ');
        let controllers = match kind.next()? {
            "cgroup2" => Vec::new(),
            "cgroup" => {
                let known = |name: &&str| ["memory", "cpu"].contains(name);
                let names: Vec<String> = kind.nth(1)?.split(',').filter(known).map(str::to_owned).collect();
                if names.is_empty() {
                    return None;
                }
                names
            }
            _ => return None,
        };
        Some(Mount { root, at: at.into(), controllers })
    };
    text.lines().filter_map(mount).collect()
}

/// Decodes the octal escapes of a mountinfo field.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}

impl Mount {
    fn holds(&self, group: &Group) -> bool {
        match self.controllers.first() {
            None => group.controllers.is_empty(),
            Some(controller) => group.controllers.contains(controller),
        }
    }

    /// Returns the directories of the group at `path` and of its ancestors, up to the mount's root.
    fn levels(&self, root: &Path, path: &str) -> Vec<PathBuf> {
        let at = root.join(self.at.strip_prefix("/").unwrap_or(&self.at));
        // In a container, the mount's root may be the group's own directory, or the path may be outside of the mount.
        let inside =
            path.strip_prefix(self.root.trim_end_matches('/')).filter(|rest| rest.is_empty() || rest.starts_with('/'));
        let inside = Path::new(inside.unwrap_or_default().trim_start_matches('/'));
        let sound = inside.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let own = if sound { at.join(inside) } else { at.clone() };
        let own = if own.is_dir() { own } else { at.clone() };
        own.ancestors().take_while(|dir| dir.starts_with(&at)).map(Path::to_owned).collect()
    }
}

/// Returns the number in the file `name` of `dir`; `None` for "max" or if the file does not exist.
fn number(dir: &Path, name: &str) -> Option<u64> {
    std::fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok()
}

/// Returns the sum of the entries `names` of `memory.stat` in `dir`.
fn stat(dir: &Path, names: &[&str]) -> u64 {
    let text = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    let wanted = pairs.filter(|(name, _)| names.contains(name));
    wanted.filter_map(|(_, value)| value.trim().parse::<u64>().ok()).fold(0, u64::saturating_add)
}

fn memory(limit: Option<u64>, used: u64, reclaimable: u64) -> Option<Memory> {
    let limit = limit?;
    Some(Memory { limit, free: limit.saturating_sub(used.saturating_sub(reclaimable)) })
}

fn memory_v2(dir: &Path) -> Option<Memory> {
    // Above `high`, the kernel throttles the group.
    let limit = [number(dir, "memory.max"), number(dir, "memory.high")].into_iter().flatten().min();
    let used = number(dir, "memory.current")?;
    memory(limit, used, stat(dir, &["inactive_file", "active_file", "slab_reclaimable"]))
}

fn memory_v1(dir: &Path) -> Option<Memory> {
    /// Version 1 represents "no limit" by a number near the maximum.
    const NONE: u64 = 1 << 60;
    let inherited = Some(stat(dir, &["hierarchical_memory_limit"])).filter(|limit| *limit > 0);
    let limit = [number(dir, "memory.limit_in_bytes"), inherited].into_iter().flatten().min();
    let used = number(dir, "memory.usage_in_bytes")?;
    memory(limit.filter(|limit| *limit < NONE), used, stat(dir, &["total_inactive_file", "total_active_file"]))
}

fn cores(quota: u64, period: u64) -> Option<f64> {
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}

fn cores_v2(dir: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(dir.join("cpu.max")).ok()?;
    let mut parts = text.split_whitespace();
    let quota = parts.next()?.parse().ok()?;
    cores(quota, parts.next().map_or(Ok(100_000), str::parse).ok()?)
}

fn cores_v1(dir: &Path) -> Option<f64> {
    // A quota of -1 means no limit.
    cores(number(dir, "cpu.cfs_quota_us")?, number(dir, "cpu.cfs_period_us")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a tree of files and returns the limits read from it.
    fn tree(files: &[(&str, &str)]) -> Limits {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        read(dir.path())
    }

    const V2: (&str, &str) =
        ("proc/self/mountinfo", "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");

    #[test]
    fn version_2_considers_ancestors_and_excludes_reclaimable_cache() {
        let own = ("proc/self/cgroup", "0::/a.slice/b.service\n");
        let limits = tree(&[
            V2,
            own,
            ("sys/fs/cgroup/cgroup.controllers", "cpu memory\n"),
            ("sys/fs/cgroup/a.slice/memory.max", "4000\n"),
            ("sys/fs/cgroup/a.slice/memory.current", "3500\n"),
            (
                "sys/fs/cgroup/a.slice/memory.stat",
                "anon 1000\ninactive_file 1500\nactive_file 400\nslab_reclaimable 100\n",
            ),
            ("sys/fs/cgroup/a.slice/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.max", "max\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.high", "3000\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.current", "900\n"),
            ("sys/fs/cgroup/a.slice/b.service/cpu.max", "max 100000\n"),
        ]);
        assert_eq!(limits, Limits { memory: Some(Memory { limit: 3000, free: 2100 }), cores: Some(1.5) });
        let limits = tree(&[
            V2,
            own,
            ("sys/fs/cgroup/a.slice/b.service/memory.max", "max\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.high", "max\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.current", "900\n"),
        ]);
        assert_eq!(limits, Limits::default());
        // The limit was lowered below the usage.
        let limits = tree(&[
            V2,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "1000\n"),
            ("sys/fs/cgroup/memory.current", "5000\n"),
        ]);
        assert_eq!(limits.memory, Some(Memory { limit: 1000, free: 0 }));
    }

    #[test]
    fn version_1_is_read_by_controller() {
        let mountinfo = "33 25 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            34 25 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            35 25 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        let limits = tree(&[
            ("proc/self/mountinfo", mountinfo),
            ("proc/self/cgroup", "5:memory:/jobs/one\n4:cpu,cpuacct:/jobs\n3:pids:/x\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "123456\n"),
            ("sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes", "700\n"),
            (
                "sys/fs/cgroup/memory/jobs/one/memory.stat",
                "cache 650\nhierarchical_memory_limit 1000\ntotal_inactive_file 100\ntotal_active_file 200\n",
            ),
            ("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(limits, Limits { memory: Some(Memory { limit: 1000, free: 600 }), cores: Some(0.5) });
    }

    #[test]
    fn in_a_container_the_mount_root_may_be_the_own_group() {
        let files = [
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "500"),
        ];
        for (root, path) in [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/", "/docker/abc"), ("/", "/../x")]
        {
            let mountinfo = format!("34 25 0:30 {root} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
            let group = format!("5:memory:{path}\n");
            let own = [("proc/self/mountinfo", mountinfo.as_str()), ("proc/self/cgroup", group.as_str())];
            let limits = tree(&[&files[..], &own].concat());
            assert_eq!(limits.memory, Some(Memory { limit: 2000, free: 1500 }), "{root} {path}");
        }
    }

    #[test]
    fn unreadable_files_set_no_limit() {
        assert_eq!(tree(&[]), Limits::default());
        let odd = [("sys/fs/cgroup/memory.max", "lots\n"), ("sys/fs/cgroup/cpu.max", "0 0\n")];
        let own = [V2, ("proc/self/cgroup", "0::/\nodd line\n"), ("sys/fs/cgroup/memory.current", "x")];
        assert_eq!(tree(&[&odd[..], &own].concat()), Limits::default());
        assert_eq!(mounts("29 22 0:26 / /with\\040space rw - cgroup2 x rw\n")[0].at, Path::new("/with space"));
    }
}
