//! The documentation says what is: its links lead somewhere, the tests it names exist, its code runs.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{SOON, Work};
use aftercommit::testing::eventually;
use sqlx::AssertSqlSafe;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            pages(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
}

/// What GitHub makes of a heading.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading.to_lowercase().chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// What is wrong with a link to `target` that reads `text`.
pub(crate) fn problem(page: &Path, text: &str, target: &str) -> Option<String> {
    let (path, fragment) = target.split_once('#').unwrap_or((target, ""));
    let path = if path.is_empty() { page.to_path_buf() } else { page.parent()?.join(path) };
    let Ok(content) = fs::read_to_string(&path) else {
        return (!path.is_dir()).then(|| "leads nowhere".into());
    };
    let mut headings = content.lines().filter(|line| line.starts_with('#'));
    if !fragment.is_empty() && !headings.any(|heading| anchor(heading.trim_start_matches(['#', ' '])) == fragment) {
        return Some("leads to no heading".into());
    }
    let named = text.strip_prefix('`').and_then(|text| text.strip_suffix('`'));
    // In the table of requirements every name of code is a test's.
    let tests = target.contains("tests/") || (page.ends_with("docs/requirements.md") && target.ends_with(".rs"));
    let test = named.filter(|name| name.chars().all(|c| c.is_alphanumeric() || c == '_') && tests);
    test.filter(|name| !content.contains(&format!("fn {name}(")))
        .map(|name| format!("names {name}, which is not there"))
}

#[test]
fn links_lead_somewhere_and_the_tests_they_name_exist() {
    let pages_at_the_root = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];
    let mut found: Vec<PathBuf> = pages_at_the_root.map(|page| root().join(page)).into();
    pages(&root().join("docs"), &mut found);
    let (mut links, mut wrong) = (0, Vec::new());
    for page in found {
        let content = fs::read_to_string(&page).unwrap();
        for (at, _) in content.match_indices("](") {
            let target = content[at + 2..].split(')').next().unwrap_or_default();
            if target.starts_with("http") {
                continue;
            }
            links += 1;
            let text = content[..at].rsplit('[').next().unwrap_or_default();
            if let Some(problem) = problem(&page, text, target) {
                wrong.push(format!("{}: [{text}]({target}) {problem}", page.display()));
            }
        }
    }
    assert!(links > 50, "only {links} links were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A name that no test begins with would leave a server untried without a word.
#[test]
fn the_tests_that_are_listed_for_other_servers_exist() {
    let list = fs::read_to_string(root().join("tests/versions")).unwrap();
    let lines = list.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let mut kinds = std::collections::BTreeSet::new();
    for line in lines {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [kind, program, name] = fields[..] else { panic!("{line}") };
        kinds.insert(kind);
        let (module, name) = name.rsplit_once("::").unwrap_or_else(|| panic!("{line}"));
        let module = fs::read_to_string(root().join(format!("tests/{program}/{}.rs", module.replace("::", "/"))));
        let module = module.unwrap_or_else(|error| panic!("{line}: {error}"));
        assert!(module.contains(&format!("async fn {name}")), "{line}");
    }
    assert_eq!(Vec::from_iter(kinds), ["batches", "client", "psql", "tagged"]);
}

/// The README's code blocks in this language.
fn blocks(language: &str) -> Vec<String> {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let fence = format!("```{language}\n");
    readme.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_string()).collect()
}

/// The packages that the README names are where it says.
#[test]
fn what_the_readme_depends_on_exists() {
    let manifest: toml::Table = blocks("toml")[0].parse().unwrap();
    for (name, dependency) in manifest["dependencies"].as_table().unwrap() {
        let Some(path) = dependency.get("path") else { continue };
        let path = path.as_str().unwrap().strip_prefix("../aftercommit").unwrap().trim_start_matches('/');
        let manifest = fs::read_to_string(root().join(path).join("Cargo.toml")).unwrap();
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_quickstart_without_rust_code_works() {
    let work = Work::shared().await;
    let pool = &work.outbox.pool;
    for block in blocks("sql") {
        sqlx::raw_sql(AssertSqlSafe(block)).execute(pool).await.unwrap();
    }
    let _worker = work.process(&blocks("toml")[1]);
    let _relay = work.outbox.relay();
    work.outbox.publish("order.placed", r#"{"order": 7, "cents": 990}"#, Some("order-7")).await;
    eventually(SOON, "the revenue is counted", async || {
        sqlx::query_scalar::<_, i64>("select cents from revenue").fetch_one(pool).await.unwrap() == 990
    })
    .await
    .unwrap();
}

#[test]
fn the_code_of_the_guides_is_tested() {
    let tested = ["tests/system/guides.rs", "tests/lifecycle/guides.rs"];
    let tested = tested.map(|file| fs::read_to_string(root().join(file)).unwrap()).concat();
    let mut found = Vec::new();
    pages(&root().join("docs/guides"), &mut found);
    let mut blocks = 0;
    for page in found {
        let content = fs::read_to_string(&page).unwrap();
        for block in content.split("```rust\n").skip(1) {
            let block = block.split("```").next().unwrap();
            blocks += 1;
            assert!(tested.contains(block), "{} has code that no guides.rs has:\n{block}", page.display());
        }
    }
    assert!(blocks > 10, "only {blocks} blocks of code were found");
}

#[test]
fn every_requirement_has_a_row_that_names_a_test_or_a_gap() {
    let table = fs::read_to_string(root().join("docs/requirements.md")).unwrap();
    let ids = (1..=36).map(|n| format!("E-{n:02}")).chain((1..=16).map(|n| format!("S-{n:02}")));
    let ids = ids.chain((1..=22).map(|n| format!("X-{n:02}")));
    let ids = ids.chain((1..=14).map(|n| format!("H-{n:02}"))).chain((1..=19).map(|n| format!("P-{n:02}")));
    let ids = ids.chain((1..=25).map(|n| format!("T-{n:02}")));
    for id in ids.chain((1..=19).map(|n| format!("D{n}"))) {
        let rows: Vec<&str> = table.lines().filter(|line| line.starts_with(&format!("| {id} |"))).collect();
        let [row] = rows[..] else { panic!("{id} has {} rows", rows.len()) };
        let columns: Vec<&str> = row.split(" | ").collect();
        assert_eq!(columns.len(), 3, "{row}");
        assert!(columns[2].contains(".rs)") || columns[2].starts_with("*Gap: "), "{id} names neither a test nor a gap");
    }
}

#[test]
fn every_fault_has_a_row_that_names_a_test_or_a_reason() {
    let table = fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    for id in (1..=40).map(|n| format!("F{n}")) {
        let rows: Vec<&str> = table.lines().filter(|line| line.starts_with(&format!("| {id} |"))).collect();
        let [row] = rows[..] else { panic!("{id} has {} rows", rows.len()) };
        let columns: Vec<&str> = row.split(" | ").collect();
        assert_eq!(columns.len(), 4, "{row}");
        assert!(
            columns[2].contains(".rs)") || columns[2].starts_with("*Not run: "),
            "{id} names neither a test nor why not"
        );
        assert!(columns[3].trim_end_matches(" |").split(' ').all(|one| one.starts_with('I')), "{row}");
    }
}

/// Helm reads nothing outside of a chart, so it has copies.
#[test]
fn the_chart_has_alerts_and_roles_as_they_are() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    for (own, copy) in [
        ("deploy/postgres/roles.sql", "deploy/helm/aftercommit/files/roles.sql"),
        ("deploy/prometheus/alerts.yml", "deploy/helm/aftercommit/files/alerts.yml"),
    ] {
        assert!(text(own) == text(copy), "{own} was changed: copy it to {copy}");
    }
}
