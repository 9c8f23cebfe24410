-- Rows of the inbox are found by their place in the stream: those that are old enough to be forgotten, and those of a part of
-- the stream that a reconciler compares. The index of ranges did that as long as rows lay in the order in which they came. Once
-- new ones fill the space of those that were forgotten each range spans everything, and each batch of the pruner read all rows.
--
-- Workers wait while the index is built, a few seconds for ten million rows. Who has more builds it before, without a wait:
--   create index concurrently inbox_positions on aftercommit.inbox (subscriber, stream_seq)

create index if not exists inbox_positions on aftercommit.inbox (subscriber, stream_seq);
drop index aftercommit.inbox_ranges;
