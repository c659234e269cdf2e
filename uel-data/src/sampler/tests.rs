use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn all(sampler: &dyn Sampler, epoch: u64) -> Vec<u64> {
    let mut out = Vec::new();
    sampler.order(epoch).unwrap().append(0..sampler.len(), &mut out);
    out
}

fn batches(sampler: &dyn BatchSampler, epoch: u64) -> Vec<Vec<u64>> {
    let batches = sampler.batches(epoch).unwrap();
    let read = |number| {
        let mut out = Vec::new();
        batches.append(number, &mut out);
        out
    };
    // Backwards: a batch may not depend on those that were asked for before it.
    let mut all: Vec<Vec<u64>> = (0..batches.len()).rev().map(read).collect();
    all.reverse();
    all
}

proptest! {
    #[test]
    fn any_part_of_an_order_is_that_of_the_whole(len in 0u64..200, seed: u64, epoch in 0u64..4, from in 0u64..200, more in 0u64..200) {
        let (begin, end) = (from.min(len), from.saturating_add(more).min(len));
        let weights: Vec<f64> = (0..len).map(|index| (index % 5) as f64 + 0.5).collect();
        let indices: Vec<u64> = (0..len).map(|index| index * 3).collect();
        let samplers: [Box<dyn Sampler>; 7] = [
            Box::new(SequentialSampler::new(len)),
            Box::new(RandomSampler::new(len, seed)),
            Box::new(SubsetSampler::new(indices.clone())),
            Box::new(SubsetSampler::shuffled(indices, seed)),
            Box::new(WeightedSampler::new(weights.clone(), len, true, seed).unwrap()),
            Box::new(WeightedSampler::new(weights, len, false, seed).unwrap()),
            Box::new(DistributedSampler::new(RandomSampler::new(len * 3, seed), 1, 3, Tail::Pad).unwrap()),
        ];
        for sampler in &samplers {
            prop_assert_eq!(sampler.len(), len);
            let whole = all(sampler, epoch);
            prop_assert_eq!(&whole, &all(sampler, epoch));
            let mut part = vec![7];
            sampler.order(epoch).unwrap().append(begin..end, &mut part);
            prop_assert_eq!(&part[1..], &whole[begin as usize..end as usize]);
        }
        for sampler in [&samplers[1], &samplers[3], &samplers[5]] {
            prop_assert_eq!(all(sampler, epoch).into_iter().collect::<BTreeSet<_>>().len() as u64, len);
        }
    }

    /// The global order is the same for every world that divides the global batch.
    #[test]
    fn ranks_together_give_the_order_of_one(len in 1u64..300, seed: u64, world in 1u64..6, times in 1u64..4, drop: bool) {
        let global = world * times;
        let tail = if drop { Tail::Drop } else { Tail::Pad };
        let rank = |rank| {
            let sampler = DistributedSampler::new(RandomSampler::new(len, seed), rank, world, tail).unwrap();
            FixedBatches::new(sampler, times as usize, false).unwrap()
        };
        let ranks: Vec<Vec<Vec<u64>>> = (0..world).map(|number| batches(&rank(number), 1)).collect();
        let alone = all(&RandomSampler::new(len, seed), 1);
        let count = ranks[0].len();
        let mut together = Vec::new();
        for batch in 0..count {
            let rows = ranks[0][batch].len();
            for row in 0..rows {
                together.extend(ranks.iter().map(|rank| rank[batch][row]));
            }
        }
        let kept = if drop { len / world * world } else { len.next_multiple_of(world) };
        prop_assert_eq!(together.len() as u64, kept);
        let expected: Vec<u64> = alone.iter().cycle().take(kept as usize).copied().collect();
        prop_assert_eq!(&together, &expected);
        prop_assert!(ranks.iter().all(|rank| rank.len() == count));
        prop_assert_eq!(count as u64, kept.div_ceil(global));
        prop_assert!((0..world).all(|number| rank(number).fingerprint() == rank(0).fingerprint()));
        let alone = DistributedSampler::new(RandomSampler::new(len, seed), 0, 1, tail).unwrap();
        let alone = FixedBatches::new(alone, global as usize, false).unwrap();
        prop_assert_eq!(alone.fingerprint(), rank(0).fingerprint());
    }

    #[test]
    fn every_index_is_in_one_batch(len in 0u64..200, size in 1usize..20, window in 1usize..6, seed: u64, drop: bool) {
        let lengths: Vec<u32> = (0..len).map(|index| (index as u32 * 7919) % 50 + 1).collect();
        let random = || RandomSampler::new(len, seed);
        let fixed = FixedBatches::new(random(), size, drop).unwrap();
        let bucket = BucketBatches::new(random(), lengths.clone(), size, window, drop, seed).unwrap();
        let tokens = TokenBatches::new(random(), lengths.clone(), 100, window, seed).unwrap();
        for (sampler, keeps) in [(&fixed as &dyn BatchSampler, !drop), (&bucket, !drop), (&tokens, true)] {
            let batches = batches(sampler, 3);
            prop_assert!(batches.iter().all(|batch| !batch.is_empty()));
            let seen: Vec<u64> = batches.concat();
            prop_assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), seen.len());
            prop_assert_eq!(seen.len() as u64, if keeps { len } else { len / size as u64 * size as u64 });
        }
        for sampler in [&fixed as &dyn BatchSampler, &bucket] {
            let batches = batches(sampler, 3);
            prop_assert!(batches.iter().rev().skip(1).all(|batch| batch.len() == size));
        }
        for batch in batches(&tokens, 3) {
            let longest = batch.iter().map(|&index| lengths[index as usize]).max().unwrap();
            prop_assert!(longest as usize * batch.len() <= 100);
        }
    }
}

#[test]
fn buckets_hold_samples_of_like_length() {
    let lengths: Vec<u32> = (0..1000).map(|index| (index * 7919) % 500).collect();
    let padding = |batches: Vec<Vec<u64>>| -> u32 {
        let of = |batch: &Vec<u64>| {
            let longest = batch.iter().map(|&index| lengths[index as usize]).max().unwrap();
            batch.iter().map(|&index| longest - lengths[index as usize]).sum::<u32>()
        };
        batches.iter().map(of).sum()
    };
    let plain = padding(batches(&FixedBatches::new(RandomSampler::new(1000, 1), 10, false).unwrap(), 0));
    let bucket = BucketBatches::new(RandomSampler::new(1000, 1), lengths.clone(), 10, 20, false, 1).unwrap();
    assert!(padding(batches(&bucket, 0)) * 5 < plain);
    assert_ne!(batches(&bucket, 0), batches(&bucket, 1));
}

#[test]
fn weights_are_kept() {
    let sampler = WeightedSampler::new(vec![1.0, 0.0, 3.0], 40_000, true, 9).unwrap();
    let mut counts = [0; 3];
    all(&sampler, 0).into_iter().for_each(|index| counts[index as usize] += 1);
    assert_eq!(counts[1], 0);
    assert!((9_600..10_400).contains(&counts[0]), "{counts:?}");
    // Without replacement the heavier index comes first three times of four.
    let sampler = WeightedSampler::new(vec![1.0, 0.0, 3.0], 2, false, 9).unwrap();
    let first = (0..4000).filter(|&epoch| all(&sampler, epoch)[0] == 2).count();
    assert!((2_880..3_120).contains(&first), "{first}");
    assert_ne!(all(&RandomSampler::new(1000, 1), 0), all(&RandomSampler::new(1000, 1), 1));
}

#[test]
fn what_cannot_be_is_refused() {
    let random = || RandomSampler::new(10, 0);
    assert!(FixedBatches::new(random(), 0, false).is_err());
    assert!(BucketBatches::new(random(), vec![1; 10], 1, 0, false, 0).is_err());
    assert!(DistributedSampler::new(random(), 2, 2, Tail::Pad).is_err());
    assert!(WeightedSampler::new(vec![1.0, -1.0], 1, true, 0).is_err());
    assert!(WeightedSampler::new(vec![f64::MAX, f64::MAX], 1, true, 0).is_err());
    assert!(WeightedSampler::new(vec![1.0, 0.0], 2, false, 0).is_err());
    let tokens = TokenBatches::new(random(), vec![1, 2, 3, 400, 5, 6, 7, 8, 9, 10], 100, 1, 0).unwrap();
    assert_eq!(tokens.batches(0).err().and_then(|error| error.index()), Some(3));
}
