//! What kind of file system a file lies on: it decides whether mapping and direct I/O pay.

use std::fs::File;

/// What kind of file system a file lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileSystem {
    /// A disk of this machine. Overlays of containers count as local, whatever lies below them.
    Local,
    /// Memory of this machine: tmpfs, ramfs or hugetlbfs.
    Memory,
    /// A file system over the network, of a cluster, or of the host of this virtual machine, by its name. Page faults in a mapping cost a round trip each there.
    Network(&'static str),
    /// A program behind FUSE, often an object store.
    Fuse,
    /// None that is known here, by the number that the system calls it.
    Unknown(u64),
}

/// The file system of `file`, or `None` where the system does not say.
///
/// ```
/// use std::fs::File;
/// use uel_core::source::{FileSystem, file_system};
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("model.safetensors");
/// # std::fs::write(&path, b"")?;
/// if let Some(FileSystem::Network(name)) = file_system(&File::open(&path)?) {
///     println!("{} lies on {name}", path.display());
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn file_system(file: &File) -> Option<FileSystem> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    return rustix::fs::fstatfs(file).ok().map(|stat| of_magic(stat.f_type as u64));
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _ = file;
        None
    }
}

/// The super block magic numbers: from `linux/magic.h` of the kernel's user API, the rest as commented.
#[cfg(any(target_os = "linux", target_os = "android", test))]
mod magic {
    pub(super) const EXT4: u32 = 0xEF53;
    pub(super) const BTRFS: u32 = 0x9123_683E;
    pub(super) const XFS: u32 = 0x5846_5342;
    pub(super) const F2FS: u32 = 0xF2F5_2010;
    pub(super) const OVERLAYFS: u32 = 0x794C_7630;
    pub(super) const ECRYPTFS: u32 = 0xF15F;
    pub(super) const SQUASHFS: u32 = 0x7371_7368;
    pub(super) const EROFS: u32 = 0xE0F5_E1E2;
    pub(super) const ISOFS: u32 = 0x9660;
    pub(super) const MSDOS: u32 = 0x4D44;
    pub(super) const EXFAT: u32 = 0x2011_BAB0;
    pub(super) const TMPFS: u32 = 0x0102_1994;
    pub(super) const RAMFS: u32 = 0x8584_58F6;
    pub(super) const HUGETLBFS: u32 = 0x9584_58F6;
    pub(super) const FUSE: u32 = 0x6573_5546;
    pub(super) const NFS: u32 = 0x6969;
    pub(super) const SMB: u32 = 0x517B;
    pub(super) const CIFS: u32 = 0xFF53_4D42;
    pub(super) const SMB2: u32 = 0xFE53_4D42;
    pub(super) const V9FS: u32 = 0x0102_1997;
    pub(super) const CEPH: u32 = 0x00C3_6400;
    pub(super) const CODA: u32 = 0x7375_7245;
    pub(super) const NCP: u32 = 0x564C;
    pub(super) const AFS: u32 = 0x5346_414F;
    pub(super) const AFS_FS: u32 = 0x6B41_4653;
    pub(super) const REISERFS: u32 = 0x5265_4973;
    pub(super) const NILFS: u32 = 0x3434;
    pub(super) const UDF: u32 = 0x1501_3346;
    /// `fs/jfs/jfs_superblock.h`: "JFS1".
    pub(super) const JFS: u32 = 0x3153_464A;
    /// `fs/hfsplus/hfsplus_raw.h`.
    pub(super) const HFSPLUS: u32 = 0x482B;
    /// `fs/ntfs/ntfs.h` of kernels that had it.
    pub(super) const NTFS: u32 = 0x5346_544E;
    pub(super) const OCFS2: u32 = 0x7461_636F;
    /// `include/uapi/linux/gfs2_ondisk.h`.
    pub(super) const GFS2: u32 = 0x0116_1970;
    /// `fs/orangefs/orangefs-kernel.h`, PVFS2 before.
    pub(super) const ORANGEFS: u32 = 0x2003_0528;
    /// `fs/vboxsf/super.c`: folders of the host of a virtual machine, as the next two.
    pub(super) const VBOXSF: u32 = 0x786F_4256;
    /// `fs.h` of the GNU coreutils, as the rest down to `ACFS`: VMware.
    pub(super) const VMHGFS: u32 = 0xBACB_ACBC;
    /// Parallels.
    pub(super) const PRL_FS: u32 = 0x7C7C_6673;
    pub(super) const PANFS: u32 = 0xAAD7_AAEA;
    /// StorNext.
    pub(super) const SNFS: u32 = 0xBEEF_DEAD;
    pub(super) const IBRIX: u32 = 0x0131_11A8;
    /// Veritas, which may be on one machine and in a cluster.
    pub(super) const VXFS: u32 = 0xA501_FCF5;
    pub(super) const ACFS: u32 = 0x6163_6673;
    /// As other programs list it; what it comes from is not public.
    pub(super) const WEKAFS: u32 = 0x1803_1977;
    /// `fs/ntfs3/super.c`.
    pub(super) const NTFS3: u32 = 0x7366_746E;
    /// `include/sys/fs/zfs.h` of OpenZFS.
    pub(super) const ZFS: u32 = 0x2FC1_2FC1;
    /// `fs/bcachefs/bcachefs_format.h`.
    pub(super) const BCACHEFS: u32 = 0xCA45_1A4E;
    /// `lustre_user.h` of Lustre.
    pub(super) const LUSTRE: u32 = 0x0BD0_0BD0;
    /// `gpfs.h` of IBM Storage Scale.
    pub(super) const GPFS: u32 = 0x4750_4653;
    /// `client_module/source/common/Common.h` of BeeGFS.
    pub(super) const BEEGFS: u32 = 0x1983_0326;
}

/// The kernel keeps a long, and some of the numbers have come out sign-extended: the low 32 bits tell.
#[cfg(any(target_os = "linux", target_os = "android", test))]
fn of_magic(f_type: u64) -> FileSystem {
    match f_type as u32 {
        magic::EXT4 | magic::BTRFS | magic::XFS | magic::F2FS | magic::ZFS | magic::BCACHEFS | magic::NTFS3 => {
            FileSystem::Local
        }
        magic::OVERLAYFS | magic::ECRYPTFS | magic::SQUASHFS | magic::EROFS | magic::ISOFS => FileSystem::Local,
        magic::MSDOS | magic::EXFAT => FileSystem::Local,
        magic::REISERFS | magic::NILFS | magic::UDF | magic::JFS | magic::HFSPLUS | magic::NTFS => FileSystem::Local,
        magic::TMPFS | magic::RAMFS | magic::HUGETLBFS => FileSystem::Memory,
        magic::FUSE => FileSystem::Fuse,
        magic::NFS => FileSystem::Network("nfs"),
        magic::SMB | magic::CIFS | magic::SMB2 => FileSystem::Network("smb"),
        magic::V9FS => FileSystem::Network("9p"),
        magic::CEPH => FileSystem::Network("ceph"),
        magic::CODA => FileSystem::Network("coda"),
        magic::NCP => FileSystem::Network("ncp"),
        magic::AFS | magic::AFS_FS => FileSystem::Network("afs"),
        magic::LUSTRE => FileSystem::Network("lustre"),
        magic::GPFS => FileSystem::Network("gpfs"),
        magic::BEEGFS => FileSystem::Network("beegfs"),
        magic::OCFS2 => FileSystem::Network("ocfs2"),
        magic::GFS2 => FileSystem::Network("gfs2"),
        magic::ORANGEFS => FileSystem::Network("orangefs"),
        magic::PANFS => FileSystem::Network("panfs"),
        magic::SNFS => FileSystem::Network("stornext"),
        magic::IBRIX => FileSystem::Network("ibrix"),
        magic::VXFS => FileSystem::Network("vxfs"),
        magic::ACFS => FileSystem::Network("acfs"),
        magic::WEKAFS => FileSystem::Network("wekafs"),
        magic::VBOXSF => FileSystem::Network("vboxsf"),
        magic::VMHGFS => FileSystem::Network("vmhgfs"),
        magic::PRL_FS => FileSystem::Network("prl_fs"),
        _ => FileSystem::Unknown(f_type),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_magic_numbers() {
        assert_eq!(of_magic(0xEF53), FileSystem::Local);
        assert_eq!(of_magic(0xFFFF_FFFF_FF53_4D42), FileSystem::Network("smb"));
        assert_eq!(of_magic(0x6969), FileSystem::Network("nfs"));
        assert_eq!(of_magic(0x0102_1994), FileSystem::Memory);
        assert_eq!(of_magic(0x7461_636F), FileSystem::Network("ocfs2"));
        assert_eq!(of_magic(0xFFFF_FFFF_AAD7_AAEA), FileSystem::Network("panfs"));
        assert_eq!(of_magic(1), FileSystem::Unknown(1));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn procfs_is_not_a_place_for_tensors() {
        let file = File::open("/proc/self/status").unwrap();
        assert!(matches!(file_system(&file), Some(FileSystem::Unknown(0x9fa0))));
    }
}
