use super::*;

/// One dimension, no bounds but room.
pub(crate) fn flat(rooms: &[u64], needs: &[u64]) -> Problem {
    let all = (0..rooms.len()).fold(0, |set: u64, bin| set | 1 << bin);
    let vector = |x: u64| {
        let mut v = [0; DIMS_MAX];
        v[0] = x;
        v
    };
    let mut problem = Problem {
        dims: 1,
        weight: [1e-3; DIMS_MAX],
        bins: (0..u8::try_from(rooms.len()).unwrap()).collect(),
        room: rooms.iter().map(|x| vector(*x)).collect(),
        pieces: needs
            .iter()
            .zip(0..)
            .map(|(x, slot)| Piece {
                need: vector(*x),
                fits: all,
                slot,
            })
            .collect(),
        slots: u32::try_from(needs.len()).unwrap(),
        plain: true,
        ..Problem::default()
    };
    problem.sort();
    problem
}

/// Whether there is a placement, by trying all; pieces in any order.
pub(crate) fn brute(problem: &Problem) -> bool {
    fn go(problem: &Problem, n: usize, room: &mut Vec<Vector>, at: &mut Vec<(u32, usize)>) -> bool {
        let Some(piece) = problem.pieces.get(n) else {
            return true;
        };
        for bin in 0..room.len() {
            let rival = at
                .iter()
                .any(|(slot, b)| *b == bin && problem.rivals.contains(&(piece.slot, *slot)));
            if piece.fits >> bin & 1 == 0
                || rival
                || (0..DIMS_MAX).any(|k| room[bin][k] < piece.need[k])
            {
                continue;
            }
            for (room, need) in room[bin].iter_mut().zip(piece.need) {
                *room -= need;
            }
            at.push((piece.slot, bin));
            if go(problem, n + 1, room, at) {
                return true;
            }
            at.pop();
            for (room, need) in room[bin].iter_mut().zip(piece.need) {
                *room += need;
            }
        }
        false
    }
    go(problem, 0, &mut problem.room.clone(), &mut Vec::new())
}

/// Panics if the placement breaks a room, a restriction or a rivalry.
pub(crate) fn holds(problem: &Problem, hosts: &[u8]) {
    let mut room = problem.room.clone();
    let bin = |slot: u32| {
        let host = hosts[slot as usize];
        problem.bins.iter().position(|b| *b == host).unwrap()
    };
    for piece in &problem.pieces {
        let at = bin(piece.slot);
        assert!(piece.fits >> at & 1 == 1);
        for (room, need) in room[at].iter_mut().zip(piece.need) {
            *room = room.checked_sub(need).expect("overfull");
        }
    }
    for (a, b) in &problem.rivals {
        assert_ne!(bin(*a), bin(*b));
    }
}

/// xorshift (Marsaglia 2003)
pub(crate) struct Noise(pub u64);
impl Noise {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn agrees(problem: &Problem) -> bool {
    let mut scratch = Scratch::default();
    let truth = brute(problem);
    if let Some(hosts) = quick(problem, &mut scratch) {
        assert!(truth);
        holds(problem, &hosts);
    }
    if fill::fill(problem, &mut scratch) {
        assert!(truth);
        holds(problem, &problem.answer(&scratch.bin_of));
    }
    if mend::mend(problem, &mut scratch, 50) {
        assert!(truth);
        holds(problem, &problem.answer(&scratch.bin_of));
    }
    if let Some(bound) = bound::refuse(problem) {
        assert!(!truth, "{bound:?} refuses {problem:?}");
    }
    match exact::search(problem, u64::MAX) {
        exact::Found::Placed(bins) => {
            assert!(truth);
            holds(problem, &problem.answer(&bins));
        }
        exact::Found::None { .. } => assert!(!truth, "{problem:?}"),
        exact::Found::Open => panic!("no budget was given"),
    }
    truth
}

#[test]
fn every_method_agrees_with_trying_all_in_one_dimension() {
    let mut noise = Noise(7);
    let mut fit = 0;
    for _ in 0..6_000 {
        let rooms: Vec<u64> = (0..2 + noise.below(4))
            .map(|_| 4 + noise.below(12))
            .collect();
        let mut needs = Vec::new();
        let mut sum = 0;
        // Close to what there is, where it is hard.
        let most = rooms.iter().sum::<u64>() - noise.below(4);
        while needs.len() < 9 {
            let x = 3 + noise.below(8);
            if sum + x > most {
                break;
            }
            sum += x;
            needs.push(x);
        }
        fit += u32::from(agrees(&flat(&rooms, &needs)));
    }
    assert!(
        (1_000..5_000).contains(&fit),
        "{fit} of 6000 fit: too one-sided"
    );
}

#[test]
fn every_method_agrees_with_trying_all_under_restrictions() {
    let mut noise = Noise(11);
    let mut fit = 0;
    for _ in 0..6_000 {
        let bins = 2 + usize::try_from(noise.below(3)).unwrap();
        let rooms: Vec<u64> = (0..bins).map(|_| 5 + noise.below(10)).collect();
        let needs: Vec<u64> = (0..2 + noise.below(6))
            .map(|_| 1 + noise.below(6))
            .collect();
        let mut problem = flat(&rooms, &needs);
        problem.plain = false;
        problem.dims = 2;
        for room in &mut problem.room {
            room[1] = 3 + noise.below(7);
        }
        for piece in &mut problem.pieces {
            piece.need[1] = noise.below(4);
            if noise.below(3) == 0 {
                piece.fits &= 1 + noise.below((1 << bins) - 1);
            }
        }
        for _ in 0..noise.below(4) {
            let a = u32::try_from(noise.below(needs.len() as u64)).unwrap();
            let b = u32::try_from(noise.below(needs.len() as u64)).unwrap();
            if a != b {
                problem.rivals.extend([(a, b), (b, a)]);
            }
        }
        problem.rivals.sort_unstable();
        problem.rivals.dedup();
        problem.sort();
        fit += u32::from(agrees(&problem));
    }
    assert!(
        (1_000..5_000).contains(&fit),
        "{fit} of 6000 fit: too one-sided"
    );
}

#[test]
fn each_bound_shows_what_it_is_for() {
    let refuse = |rooms: &[u64], needs: &[u64]| bound::refuse(&flat(rooms, needs));
    assert!(matches!(
        refuse(&[5, 5], &[4, 4, 4]),
        Some(Bound::Sum {
            need: 12,
            have: 10,
            ..
        })
    ));
    assert!(matches!(
        refuse(&[5, 5], &[6]),
        Some(Bound::Single { slot: 0 })
    ));
    assert!(matches!(
        refuse(&[7, 7, 7], &[4, 4, 4, 4]),
        Some(Bound::Count {
            least: 4,
            pieces: 4,
            places: 3,
            ..
        })
    ));
    // 6 + 6 into 7 and 5, 4 and 2 besides: 5 holds 4, 7 holds 6, and one 6 is left.
    assert!(refuse(&[7, 5], &[6, 4]).is_none());
    // Even pieces cannot fill odd rooms.
    assert!(matches!(
        refuse(&[5, 5, 5], &[2, 2, 2, 2, 2, 2, 2]),
        Some(Bound::Count { .. })
    ));
    assert!(matches!(
        refuse(&[9, 9], &[6, 6, 4]),
        Some(Bound::Gaps { .. } | Bound::Count { .. } | Bound::Steps { .. })
    ));
}

#[test]
fn a_spent_budget_is_said() {
    // Refused by no bound, and not decided in one step.
    let problem = flat(&[10, 10, 10], &[6, 4, 6, 4, 5, 5]);
    assert_eq!(exact::search(&problem, 1), exact::Found::Open);
    assert!(matches!(
        exact::search(&problem, 100),
        exact::Found::Placed(_)
    ));
}

#[test]
fn sums_are_tabled_exactly() {
    let mut reach = bound::Reach::new(200);
    for size in [70, 65, 64, 1] {
        reach.add(size);
    }
    for (most, sum) in [
        (0, 0),
        (63, 1),
        (64, 64),
        (69, 66),
        (134, 134),
        (136, 136),
        (199, 199),
        (500, 200),
    ] {
        assert_eq!(reach.below(most), sum, "{most}");
    }
}
