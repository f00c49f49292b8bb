//! The tree against a sorted list, its shape against what AVL promises.

extern crate std;

use super::*;
use crate::file::FileCache;
use crate::file::test::{Disk, Machine, Random, machine};
use crate::rmap::file::{Mappings, OfFile};
use crate::rmap::{Present, Space};
use crate::space::VmaFlags;
use crate::space::{Backing, Vma};
use crate::types::{PAGE_SIZE, Prot, VirtAddr, VirtRange};
use std::vec::Vec;

type Mapping = Shared<Machine, Vma<Machine>>;
type Vmas = Vec<Mapping>;

fn mapping(
    p: &'static Machine,
    space: &Shared<Machine, Space<Machine>>,
    file: &Shared<Machine, FileCache<Machine>>,
    first: u64,
    pages: u64,
) -> Mapping {
    let start = VirtAddr(1 << 30);
    let range = VirtRange::new(start, VirtAddr(start.0 + pages * PAGE_SIZE));
    let backing = Backing::File { file: file.clone(), first };
    let vm = crate::platform::Platform::vm(p);
    let mut vma = Vma::new(vm.new_id(), range, Prot::READ, VmaFlags::empty(), backing);
    vma.enter(space).expect("memory for a spot");
    vm.vmas.share(vma).expect("memory for a VMA")
}

/// The height of a subtree and its last index, as they are.
fn check(key: &Key, tree: &Subtree<Machine, OfFile>, out: &mut Vmas) -> (u8, u64) {
    let Some(vma) = tree else { return (0, 0) };
    let known = OfFile::links(vma).get(key);
    let (before, most_before) = check(key, &known.below[0], out);
    out.push(vma.clone());
    let (behind, most_behind) = check(key, &known.below[1], out);
    assert!(before.abs_diff(behind) <= 1);
    assert_eq!(known.height, before.max(behind) + 1);
    assert_eq!(known.last, OfFile::last(vma).max(most_before).max(most_behind));
    (known.height, known.last)
}

#[test]
fn it_agrees_with_a_sorted_list() {
    let p = machine(600);
    for seed in 1..12 {
        let mut random = Random(seed);
        let disk = Disk::empty();
        let file = p.cache(&disk, 0);
        let space = Present::new(p, None).expect("memory for a space");
        let mut tree = Mappings::new();
        let mut model: Vmas = Vec::new();
        let most = [5, 60, 400][seed as usize % 3];
        for step in 0..1500 {
            if random.below(most) >= model.len() as u64 {
                let pages = 1 + [0, random.below(10), random.below(1000)][random.below(3) as usize];
                let vma = mapping(p, &space, &file, random.below(300), pages);
                tree.insert(&vma);
                tree.insert(&vma);
                let at = model.partition_point(|v| OfFile::place(v) < OfFile::place(&vma));
                model.insert(at, vma);
            } else {
                let vma = model.remove(random.below(model.len() as u64) as usize);
                assert!(tree.remove(&vma).is_some_and(|out| out.same(&vma)));
                assert!(tree.remove(&vma).is_none());
                tree.insert(&vma); // never again
            }
            let first = random.below(400);
            let until = first + [0, random.below(20), u64::MAX / 2][random.below(3) as usize];
            let (mut after, mut found) = (None, Vec::new());
            while let Some((place, vma)) = tree.next(after, first, until) {
                after = Some(place);
                found.push(vma.id);
            }
            let overlaps = |v: &&Mapping| OfFile::place(v).first <= until && OfFile::last(v) >= first;
            let wanted: Vec<_> = model.iter().filter(overlaps).map(|v| v.id).collect();
            assert_eq!(found, wanted, "step {step}");
            if step % 50 == 0 {
                let mut all = Vec::new();
                check(&tree.key, &tree.root, &mut all);
                assert!(all.len() == model.len() && all.iter().zip(&model).all(|(a, b)| a.same(b)));
            }
        }
        model.drain(..).for_each(|vma| drop(tree.remove(&vma)));
        assert!(tree.root.is_none());
        drop((tree, space, file));
        p.assert_empty();
    }
}
