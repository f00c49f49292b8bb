//! What Linux takes for the same, and what we aim for: instructions for an operation.
//!
//! Linux "lean" in the same QEMU: one CPU, `-cpu max,erms=off,fsrm=off`, `mitigations=off init_on_alloc=0`.

/// A row of the table.
pub(super) struct Peer {
    /// The case.
    pub(super) name: &'static str,
    /// Linux 6.1.
    pub(super) linux_6_1: Option<u32>,
    /// Linux 6.12.
    pub(super) linux_6_12: Option<u32>,
    /// At most so many of ours.
    pub(super) goal: Option<u32>,
}

const fn peer(name: &'static str, linux_6_1: u32, linux_6_12: u32, goal: u32) -> Peer {
    Peer { name, linux_6_1: Some(linux_6_1), linux_6_12: Some(linux_6_12), goal: Some(goal) }
}

static PEERS: [Peer; 16] = [
    Peer { name: "null system call", linux_6_1: Some(315), linux_6_12: Some(308), goal: None },
    peer("anonymous write, 4 KiB", 3330, 3569, 1100),
    peer("anonymous read (zero page)", 1256, 1485, 500),
    peer("anonymous write, one per 2 MiB (new table)", 4247, 4708, 1900),
    peer("anonymous munmap, per page", 1300, 1024, 150),
    peer("anonymous munmap, one per 2 MiB", 5937, 6548, 900),
    peer("file read, per 64 KiB fault (16 pages)", 9266, 8644, 1800),
    peer("shared file write, per page", 2269, 2472, 700),
    peer("private file write (COW)", 3899, 5164, 1300),
    peer("fault beyond end of file, empty range", 4251, 4665, 500),
    peer("file munmap, per page", 469, 445, 100),
    peer("huge tmpfs read, per 2 MiB", 7579, 3610, 700),
    peer("mmap + touch + munmap, 4 KiB", 16691, 16418, 5000),
    // Of Linux 6.12's fork the figure is not steady.
    peer("fork, per mapped 4 KiB page", 141, 490, 100),
    peer("COW in child, per page", 4003, 5037, 1300),
    peer("write-protect reuse in parent", 1428, 1553, 500),
];

/// The peers of a case, if there are any.
pub(super) fn find(name: &str) -> Option<&'static Peer> {
    PEERS.iter().find(|peer| peer.name == name)
}
